"""The page guard: a page whose error is large against its own variation is stored in the next wider kind.

It catches what no format with ranges over a page can hold, such as one token a hundred times larger than the others.
"""

import dataclasses

import torch

from pikv_hf.kernels.open_pages import open_pages
from pikv_hf.kernels.page_codes import Kind
from pikv_hf.kernels.seal_pages import seal_pages

#: The largest ratio, see :func:`page_errors`, that a page of each kind may have.
LIMITS: dict[Kind, float] = {"int8": 0.014, "int4": 0.2, "int2": 1.0}

#: The kind that a page takes if its own does not hold it.
WIDER: dict[Kind, Kind] = {"int2": "int4", "int4": "int8", "int8": "none"}


@dataclasses.dataclass(frozen=True, slots=True)
class Guarded:
    """Pages as they are read back.

    Attributes
    ----------
    keys, values : torch.Tensor or None
        `(H, N, P, D)` and `(H, N, P, Dv)`; None where they were not given.
    kinds : tuple of str
        N kinds.
    largest : float
        The largest ratio of a page and head in the kind that was asked for.
    """

    keys: torch.Tensor | None
    values: torch.Tensor | None
    kinds: tuple[Kind, ...]
    largest: float


def page_errors(exact: torch.Tensor, decoded: torch.Tensor, *, centred: bool = True) -> torch.Tensor:
    """Return the error of pages against their variation.

    Parameters
    ----------
    exact, decoded : torch.Tensor
        `(H, N, P, D)` float32.
    centred : bool
        Whether variation is the mean absolute deviation from each channel's mean; otherwise it is the mean absolute
        value. Neither is squared, so that a single large token raises it less than it raises the error.

    Returns
    -------
    torch.Tensor
        `(H, N)`: root mean square error over variation; infinite, or nearly so, where equal tokens have an error.
    """
    error = (exact - decoded).square().mean((2, 3)).sqrt()
    variation = ((exact - exact.mean(2, keepdim=True)) if centred else exact).abs().mean((2, 3))
    return error / variation.clamp_min(torch.finfo(torch.float32).tiny)


def guard_pages(
    keys: torch.Tensor | None, values: torch.Tensor | None, kind: Kind, *, values_by_size: bool = False
) -> Guarded:
    """Code pages in the narrowest kind from `kind` on that holds their keys and values.

    Parameters
    ----------
    keys, values : torch.Tensor, optional
        `(H, N, P, D)` and `(H, N, P, Dv)` float32. A page has one kind for all heads, keys and values alike.
    kind : str
        An integer kind.
    values_by_size : bool
        Compare the error of values with their size rather than with their deviation.

    Raises
    ------
    ValueError
        If there is no limit for `kind`.
    """
    if kind not in LIMITS:
        raise ValueError(f"the guard has limits for {', '.join(LIMITS)}, not for {kind!r}")
    given = [(part, is_keys) for part, is_keys in ((keys, True), (values, False)) if part is not None]
    decoded = [torch.empty_like(part) for part, _ in given]
    kinds = [kind] * given[0][0].shape[1]
    waiting = torch.arange(len(kinds))
    current, largest = kind, 0.0
    while len(waiting):
        worst = torch.zeros(len(waiting))
        for (part, is_keys), result in zip(given, decoded, strict=True):
            exact = part[:, waiting]
            result[:, waiting] = opened = open_pages(seal_pages(exact, current, keys=is_keys), torch.float32)
            ratios = page_errors(exact, opened, centred=is_keys or not values_by_size)
            worst = torch.maximum(worst, ratios.amax(0))
        largest = worst.max().item() if current == kind else largest
        if current not in LIMITS:
            break
        waiting, current = waiting[worst > LIMITS[current]], WIDER[current]
        for page in waiting.tolist():
            kinds[page] = current
    results = iter(decoded)
    opened_keys = None if keys is None else next(results)
    return Guarded(opened_keys, None if values is None else next(results), tuple(kinds), largest)
