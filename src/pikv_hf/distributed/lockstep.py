"""Whether processes that should compute the same do so: headers that they exchange, and how far these may differ."""

import functools
import math

import torch

# Numbers that stand for vectors.
PROJECTIONS = 3

# What every process says of a call, in float32: layer, positions seen, rows, queries, what it is about to do, and
# projections of its queries.
HEADER = 5 + PROJECTIONS
INTENT = 4
MERGES, FAILS, AGREES = 0.0, 1.0, 2.0

# What they agree on before a size changes: besides, the query heads, the dimension of values, the tokens of the last
# prompt and projections of their keys.
AGREEMENT = HEADER + 3 + PROJECTIONS

_COUNTS = {0: "layer", 1: "positions seen", 2: "rows", 3: "queries", HEADER: "query heads", HEADER + 1: "value dim"}
_PROMPT_TOKENS = HEADER + 2
_PROMPT = slice(HEADER + 3, AGREEMENT)
_QUERIES = slice(INTENT + 1, HEADER)

# Projections of the same vectors differ between processes by rounding alone, of one other among them by about 1.
SAME = 0.1

# Vectors whose copies in float32 are made at a time.
_PIECE = 4096


def header_of(layer_idx: int, seen: int, query: torch.Tensor, looks: bool = True) -> torch.Tensor:
    """Return what a process says of a call: `(8,)` float32, see :data:`HEADER`; zeros for queries unless it looks."""
    counts = torch.tensor([layer_idx, seen, query.shape[0], query.shape[2], MERGES], dtype=torch.float32)
    counts = counts.to(query.device)
    return torch.cat([counts, fingerprint(query) if looks else counts.new_zeros(PROJECTIONS)])


def prompt_mark(keys: torch.Tensor) -> torch.Tensor:
    """Return the number of tokens of keys `(B, H, Q, D)` and their :func:`fingerprint`, `(4,)` float32."""
    mark = fingerprint(keys)
    return torch.cat([mark.new_tensor([keys.shape[0] * keys.shape[2]]), mark])


def fingerprint(vectors: torch.Tensor) -> torch.Tensor:
    """Return projections of vectors that tell whether two processes have the same.

    Each vector counts by its direction alone and each as much as any other, so that one among thousands is noticed.
    A vector with anything but finite numbers does not count.

    Parameters
    ----------
    vectors : torch.Tensor
        `(B, H, Q, D)` queries or keys.

    Returns
    -------
    torch.Tensor
        `(3,)` float32. Each is a sum over the `B * Q` vectors of numbers between -1.5 and 1.5.
    """
    batch, heads, tokens, dim = vectors.shape
    angles = _angles(heads * dim, str(vectors.device))
    rows = torch.arange(batch, device=vectors.device)[:, None] * tokens
    result = torch.zeros(PROJECTIONS, device=vectors.device)
    step = max(1, _PIECE // max(1, batch))
    for first in range(0, tokens, step):
        piece = vectors.detach()[:, :, first : first + step].transpose(1, 2).flatten(2).float()
        # Their order counts too, and none of them for little.
        number = rows + torch.arange(first, first + piece.shape[1], device=vectors.device)
        weight = 1 + 0.5 * torch.cos(number * 2.39996)
        directions = (piece @ angles) / piece.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        directions = torch.nan_to_num(directions, nan=0.0, posinf=0.0, neginf=0.0)
        result += weight.flatten() @ directions.flatten(0, 1)
    return result


@functools.lru_cache(maxsize=16)
def _angles(size: int, device: str) -> torch.Tensor:
    """Return `(size, 3)` float32 without a pattern, the same in all processes; no generator's state is touched.

    A unit vector at random has projections of about 1 on them.
    """
    steps = torch.tensor([1.7, 2.3, 0.9], dtype=torch.float64)
    angles = torch.sin(torch.arange(1, 1 + size, dtype=torch.float64)[:, None] * steps)
    return angles.float().to(device)


def tolerance(count: float, dtype: torch.dtype) -> float:
    """Return by how much the projections of the same `count` vectors may differ from process to process.

    On the same hardware they do not at all. On other hardware rounding adds up over vectors.
    """
    return SAME + 2 * torch.finfo(dtype).eps * math.sqrt(max(1.0, count))


def agreement_of(
    layer_idx: int, seen: int, query: torch.Tensor, value_dim: int, prompt: torch.Tensor | None, looks: bool = True
) -> torch.Tensor:
    """Return what a process says before it merges results of another size: `(14,)` float32, see :data:`AGREEMENT`."""
    header = header_of(layer_idx, seen, query, looks)
    header[INTENT] = AGREES
    mark = header.new_zeros(1 + PROJECTIONS) if prompt is None else prompt.to(header.device)
    return torch.cat([header, header.new_tensor([query.shape[1], value_dim]), mark])


def difference(mine: list[float], other: list[float], dtype: torch.dtype) -> str:
    """Return in which way two headers, or agreements, are not of the same call; empty if they are."""
    counts = [
        f"{name} {mine[at]:.0f} here and {other[at]:.0f} there"
        for at, name in _COUNTS.items()
        if (at < HEADER or mine[INTENT] == other[INTENT] == AGREES) and mine[at] != other[at]
    ]
    if mine[INTENT] != other[INTENT]:
        counts.append("only one of them has new rows or has read a prompt")
    if counts:
        return f"do different things: {', '.join(counts)}; give all ranks the same inputs"
    if mine[INTENT] == AGREES:
        tokens = mine[_PROMPT_TOKENS]
        if tokens != other[_PROMPT_TOKENS] or _far(mine[_PROMPT], other[_PROMPT], tolerance(tokens, dtype)):
            return "have read different prompts, or have different weights; give all ranks the same inputs"
    if _far(mine[_QUERIES], other[_QUERIES], tolerance(mine[2] * mine[3], dtype)):
        return (
            "attend with different queries, so they have read or sampled different tokens; give all ranks the same "
            "inputs and the same seed"
        )
    return ""


def _far(here: list[float], there: list[float], limit: float) -> bool:
    return any(abs(a - b) > limit for a, b in zip(here, there, strict=True))
