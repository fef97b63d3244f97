"""The page guard: a page whose error is large against its own size is stored in the next wider kind.

It catches what no format with ranges over a page can hold, such as one token a hundred times larger than the others.
What ships is :mod:`pikv_hf.codecs.page_encoder`, which is used here as it is. The rule tried first judged values as
keys are judged, by what they deviate from the mean of their channel. It gave up on pages of equal values, whose
deviation is nothing, although the codes held them well.
"""

import dataclasses

import torch

from pikv_hf.codecs.page_encoder import GUARD, LADDER, PageEncoder
from pikv_hf.common.kv import KV
from pikv_hf.config import PiKVConfig
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import Kind


@dataclasses.dataclass(frozen=True, slots=True)
class Guarded:
    """Pages of keys, or of values, as they are read back.

    Attributes
    ----------
    pages : torch.Tensor
        `(H, N, P, D)` float32.
    kinds : tuple of str
        N kinds.
    largest : float
        The largest ratio, see :func:`page_errors`, of a page and head in the kind that was asked for.
    """

    pages: torch.Tensor
    kinds: tuple[str, ...]
    largest: float


def page_errors(exact: torch.Tensor, decoded: torch.Tensor, *, centred: bool) -> torch.Tensor:
    """Return the error of pages against their size.

    Parameters
    ----------
    exact, decoded : torch.Tensor
        `(H, N, P, D)` float32.
    centred : bool
        Whether size is the mean absolute deviation from each channel's mean, as the guard has it for keys; otherwise it
        is the mean absolute value. Neither is squared, so that a single large token raises it less than the error.

    Returns
    -------
    torch.Tensor
        `(H, N)`: root mean square error over size; infinite, or nearly so, where there is an error but no size.
    """
    error = (exact - decoded).square().mean((2, 3)).sqrt()
    size = ((exact - exact.mean(2, keepdim=True)) if centred else exact).abs().mean((2, 3))
    return error / size.clamp_min(torch.finfo(torch.float32).tiny)


def guard_pages(pages: torch.Tensor, kind: Kind, *, keys: bool) -> Guarded:
    """Code pages in the narrowest kind from `kind` on that the cache takes for them.

    Parameters
    ----------
    pages : torch.Tensor
        `(H, N, P, D)` float32. A page has one kind for all heads.
    kind : str
        An integer kind.
    keys : bool
        Keys or values.

    Raises
    ------
    ValueError
        If there is no limit for `kind`.
    """
    _check_kind(kind)
    decoded = torch.empty_like(pages)
    kinds = [kind] * pages.shape[1]
    for part in PageEncoder(kind, KV.KEYS if keys else KV.VALUES, PiKVConfig()).encode(pages, None, 1.0):
        decoded[:, torch.from_numpy(part.which)] = part.codec.decode(part.codes, torch.float32)
        for page in part.which.tolist():
            kinds[page] = part.codec.kind
    return Guarded(decoded, tuple(kinds), _coded(pages, kind, keys=keys, centred=keys)[1].max().item())


def guard_by_rule(pages: torch.Tensor, kind: Kind, *, keys: bool, centred: bool) -> Guarded:
    """Code pages by the rule of :func:`page_errors` that `centred` says, with the limits of the cache.

    Parameters
    ----------
    pages, kind, keys
        As in :func:`guard_pages`.
    centred : bool
        True is the rule tried first.

    Raises
    ------
    ValueError
        If there is no limit for `kind`.
    """
    _check_kind(kind)
    decoded = pages.clone()
    kinds = ["none"] * pages.shape[1]
    largest = _coded(pages, kind, keys=keys, centred=centred)[1].max().item()
    waiting = torch.arange(pages.shape[1])
    for rung in LADDER[LADDER.index(kind) : -1]:
        opened, ratios = _coded(pages[:, waiting], rung, keys=keys, centred=centred)  # type: ignore[arg-type]
        held = (ratios <= GUARD[rung]).all(0)
        decoded[:, waiting[held]] = opened[:, held]
        for page in waiting[held].tolist():
            kinds[page] = rung
        waiting = waiting[~held]
    return Guarded(decoded, tuple(kinds), largest)


def _check_kind(kind: str) -> None:
    if kind not in GUARD:
        raise ValueError(f"the guard has limits for {', '.join(GUARD)}, not for {kind!r}")


def _coded(pages: torch.Tensor, kind: Kind, *, keys: bool, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages as a kind gives them back, and the ratio of every head and page."""
    opened = decode_pages(encode_pages(pages, kind, keys=keys), torch.float32)
    return opened, page_errors(pages, opened, centred=centred)
