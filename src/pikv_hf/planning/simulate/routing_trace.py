"""Routing traces: the primary expert of every token of a run, recorded or made up, in one small file."""

import dataclasses
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# What zipfile and numpy raise for files that are damaged somewhere; RuntimeError for a bit that means encryption.
_DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
#: Of the file's layout; other versions are refused.
VERSION = 1
_HEADER = ("version", "model", "layers", "num_experts", "tokens", "prompt_tokens")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """The primary (top-1) expert of each token at each routed layer, in the order in which the model read them.

    Attributes
    ----------
    experts : numpy.ndarray
        `(layers, tokens)` int16, each in `[0, num_experts)`.
    num_experts : int
        Experts to choose from in every layer.
    layers : tuple of int
        The model layers that the rows belong to, in ascending order.
    model : str
        Where it comes from, for people.
    prompt_tokens : int
        The first tokens that the model read as a prompt; the rest are questions and answers.

    Raises
    ------
    ValueError
        If shapes, numbers or experts do not fit each other.
    """

    experts: npt.NDArray[np.int16]
    num_experts: int
    layers: tuple[int, ...]
    model: str
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        experts = np.asarray(self.experts)
        if experts.ndim != 2 or 0 in experts.shape or experts.dtype.kind not in "iu":
            raise ValueError(f"experts have to be integers (layers, tokens), got {experts.dtype} {experts.shape}")
        if len(self.layers) != len(experts) or sorted(set(self.layers)) != list(self.layers):
            raise ValueError(f"{len(experts)} rows of experts need as many ascending layers, got {self.layers}")
        if not 1 <= self.num_experts <= np.iinfo(np.int16).max:
            raise ValueError(f"num_experts has to be in 1..{np.iinfo(np.int16).max}, got {self.num_experts}")
        low, high = int(experts.min()), int(experts.max())
        if low < 0 or high >= self.num_experts:
            raise ValueError(f"experts have to be in 0..{self.num_experts - 1}, got {low}..{high}")
        if not 0 <= self.prompt_tokens <= experts.shape[1]:
            raise ValueError(f"prompt_tokens has to be in 0..{experts.shape[1]}, got {self.prompt_tokens}")
        object.__setattr__(self, "experts", experts.astype(np.int16, copy=False))

    @property
    def tokens(self) -> int:
        """Tokens of each layer."""
        return int(self.experts.shape[1])

    def loads(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each expert, `(layers, num_experts)`."""
        rows = np.arange(len(self.layers))[:, None] * self.num_experts + self.experts
        return np.bincount(rows.ravel(), minlength=len(self.layers) * self.num_experts).reshape(-1, self.num_experts)

    def resized(self, tokens: int, layers: int | None = None) -> "RoutingTrace":
        """Return the trace of so many tokens, and layers, cut off or repeated from its start.

        Raises
        ------
        ValueError
            If a number is not positive.
        """
        rows = len(self.layers) if layers is None else layers
        if tokens < 1 or rows < 1:
            raise ValueError(f"a trace has at least one token and layer, got {tokens} and {rows}")
        experts = self.experts[np.arange(rows) % len(self.layers)][:, np.arange(tokens) % self.tokens]
        names = self.layers if layers is None else tuple(range(layers))
        return dataclasses.replace(self, experts=experts, layers=names, prompt_tokens=min(self.prompt_tokens, tokens))

    def header(self) -> dict[str, Any]:
        """Return everything but the experts as plain values."""
        return {
            "version": VERSION,
            "model": self.model,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
        }


def save_trace(trace: RoutingTrace, path: str | Path) -> Path:
    """Write a trace as a compressed NPZ file with a JSON header; it is there completely or not at all.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, header=np.array(json.dumps(trace.header())), experts=trace.experts)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def load_trace(path: str | Path) -> RoutingTrace:
    """Read a trace.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no trace, of another version, or damaged.
    """
    path = Path(path)
    try:
        # Pickled objects could run code.
        with np.load(path, allow_pickle=False) as file:
            header, experts = json.loads(str(file["header"])), file["experts"]
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{path} is no routing trace, or a damaged one: {error}") from error
    try:
        return _checked(header, experts)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(header: Any, experts: npt.NDArray[Any]) -> RoutingTrace:
    if not isinstance(header, dict) or sorted(header) != sorted(_HEADER):
        raise ValueError(f"the header has to have {', '.join(_HEADER)}, got {header}")
    if header["version"] != VERSION:
        raise ValueError(f"version {VERSION} is read here, got version {header['version']}")
    trace = RoutingTrace(
        experts, header["num_experts"], tuple(header["layers"]), str(header["model"]), header["prompt_tokens"]
    )
    if trace.tokens != header["tokens"]:
        raise ValueError(f"the header names {header['tokens']} tokens, the file has {trace.tokens}")
    return trace


@dataclasses.dataclass(frozen=True, slots=True)
class Popularity:
    """How made-up tokens choose their experts.

    Attributes
    ----------
    skew : float
        The expert of rank k is chosen with a probability proportional to `k ** -skew`; 0 is uniform.
    stickiness : float
        In [0, 1), the probability that a token goes where the one before went. It changes no expert's share.
    topic_tokens : int or None
        After so many tokens each the popularity of half of the experts is exchanged among them; None for never.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    skew: float = 1.0
    stickiness: float = 0.0
    topic_tokens: int | None = None

    def __post_init__(self) -> None:
        skew, stickiness = self.skew, self.stickiness
        if self.topic_tokens is not None and self.topic_tokens < 1:
            raise ValueError(f"topic_tokens has to be at least 1, got {self.topic_tokens}")
        if not 0 <= skew < np.inf or not 0 <= stickiness < 1:
            raise ValueError(f"skew has to be at least 0 and stickiness in [0, 1), got {skew} and {stickiness}")


def synthetic_trace(
    layers: int, experts: int, tokens: int, popularity: Popularity | None = None, seed: int = 0
) -> RoutingTrace:
    """Make up a trace with Zipf-distributed experts, in each layer others being popular.

    Parameters
    ----------
    layers, experts, tokens : int
        Its size.
    popularity : Popularity, optional
        How tokens choose.
    seed : int
        Of the generator; the same arguments give the same trace.

    Raises
    ------
    ValueError
        If a size is less than 1.
    """
    for name, value in (("layers", layers), ("experts", experts), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{name} has to be at least 1, got {value}")
    chosen = Popularity() if popularity is None else popularity
    skew, stickiness, topic_tokens = chosen.skew, chosen.stickiness, chosen.topic_tokens
    generator = np.random.default_rng(seed)
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -skew
    bounds = np.cumsum(weights)[:-1] / weights.sum()
    rows = np.empty((layers, tokens), np.int16)
    for row in rows:
        ranks = np.searchsorted(bounds, generator.random(tokens), side="right")
        popular = generator.permutation(experts)
        for start in range(0, tokens, topic_tokens or tokens):
            if start:
                popular = _exchange_half(popular, generator)
            stop = start + (topic_tokens or tokens)
            row[start:stop] = popular[ranks[start:stop]]
        # The last token that chose anew decides for those that stick to it.
        fresh = generator.random(tokens) >= stickiness
        fresh[0] = True
        row[:] = row[np.maximum.accumulate(np.where(fresh, np.arange(tokens), 0))]
    return RoutingTrace(rows, experts, tuple(range(layers)), f"synthetic, Zipf {skew:g}", tokens)


def _exchange_half(popular: npt.NDArray[Any], generator: np.random.Generator) -> npt.NDArray[Any]:
    changed, places = popular.copy(), generator.choice(len(popular), len(popular) // 2, replace=False)
    changed[places] = popular[generator.permutation(places)]
    return changed
