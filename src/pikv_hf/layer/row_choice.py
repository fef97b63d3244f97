"""Which rows of a batch an index means, as transformers' caches index with it."""

from typing import Any

import torch


def rows_at(indices: Any, rows: int) -> torch.Tensor:
    """Return the rows, `(n,)` int64, that `batch_select_indices` is to keep of so many.

    Parameters
    ----------
    indices : torch.Tensor, sequence or slice
        Integers, negative ones from the end, or one bool per row.
    rows : int
        Of the cache.

    Raises
    ------
    TypeError
        For what takes no rows from a batch, or takes its dimension away, as a number does.
    IndexError
        For rows that there are not, and another number of bools.
    """
    if isinstance(indices, torch.Tensor):
        indices = indices.cpu()
    elif isinstance(indices, tuple | range):
        indices = list(indices)
    elif isinstance(indices, str):
        raise TypeError(_message(indices))
    try:
        chosen: Any = torch.arange(rows)[indices]
    except IndexError as error:
        if not _is_of_rows(indices):
            raise TypeError(_message(indices)) from error
        raise IndexError(f"rows {indices} are no rows of a cache of {rows} rows: {error}") from error
    except (TypeError, ValueError) as error:
        raise TypeError(_message(indices)) from error
    if chosen.ndim != 1:
        raise TypeError(_message(indices))
    return torch.as_tensor(chosen)


def _is_of_rows(indices: Any) -> bool:
    """Return whether an index is one of integers or bools."""
    given = torch.as_tensor(indices) if isinstance(indices, torch.Tensor | list) else None
    return given is None or (given.ndim == 1 and not given.is_floating_point())


def _message(indices: Any) -> str:
    return (
        "batch_select_indices takes rows as a vector of integers, a list, a slice, or one bool per row, got "
        f"{type(indices).__name__} {indices!r}"
    )


def beam_rows(beam_idx: Any) -> torch.Tensor:
    """Return the rows of `reorder_cache`, `(n,)` integers.

    Raises
    ------
    TypeError
        Unless they are a tensor of integers, of at most one dimension.
    """
    if not isinstance(beam_idx, torch.Tensor) or beam_idx.dtype not in (torch.int32, torch.int64) or beam_idx.ndim > 1:
        shown = f"{beam_idx.dtype} {tuple(beam_idx.shape)}" if isinstance(beam_idx, torch.Tensor) else repr(beam_idx)
        raise TypeError(f"reorder_cache takes a vector of int32 or int64, got {type(beam_idx).__name__} {shown}")
    return beam_idx.reshape(-1)
