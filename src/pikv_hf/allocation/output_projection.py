"""How an attention module's output projection measures what a head returns."""

import warnings
import weakref
from typing import Any

import torch
from torch import nn

from ..common.user_line import user_stacklevel
from .eviction_loss import output_gram

#: By module the weight that was measured, as far as it can be told from another, and what came of it.
_grams: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, torch.Tensor]]" = weakref.WeakKeyDictionary()


def gram_of(module: nn.Module, query_heads: int, value_dim: int) -> torch.Tensor:
    """Return `(Hq, Dv, Dv)`, how the output projection measures a head's output; the identity if there is none.

    Where accelerate has moved the weight elsewhere until the projection is called, it is called, with the unit vectors:
    a weight that cannot be had so either is said, and the identity takes its place.
    """
    projection = getattr(module, "o_proj", None)
    weight = getattr(projection, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] != query_heads * value_dim:
        return _identity(module, query_heads, value_dim)
    # Computed once per weight. Training it further changes the version, which weights of inference mode do not count.
    version = None if weight.is_inference() else (weight.data_ptr(), weight._version)
    known = _grams.get(module)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    present = _fetched(projection, weight) if weight.is_meta else weight.detach()
    if present is None:
        warnings.warn(
            f"the weight of {type(module).__name__}'s output projection is not in memory, and cannot be had by calling "
            "it: the values of its heads count by their plain distance",
            stacklevel=user_stacklevel(),
        )
        return _identity(module, query_heads, value_dim)
    gram = output_gram(present, query_heads)
    if version is not None:
        _grams[module] = version, gram
    return gram


def _identity(module: nn.Module, query_heads: int, value_dim: int) -> torch.Tensor:
    device = next((each.device for each in module.parameters() if not each.is_meta), None)
    return torch.eye(value_dim, device=device).expand(query_heads, -1, -1)


@torch.no_grad()
def _fetched(projection: Any, weight: torch.Tensor) -> torch.Tensor | None:
    """Return the weight of a projection that has it in memory while it is called, None if it cannot be called so."""
    if not hasattr(projection, "_hf_hook"):
        # Nobody fetches it for a call, which would return whatever is in memory: torch multiplies by nothing there.
        return None
    unit = torch.eye(weight.shape[1], dtype=weight.dtype)
    try:
        columns = projection(torch.cat([unit, torch.zeros_like(unit[:1])]))
    except Exception:
        # Somebody's hook that wants what only attention gives.
        return None
    if not isinstance(columns, torch.Tensor) or columns.ndim != 2 or columns.is_meta:
        return None
    # What a bias adds to all of them is not of the weight.
    return (columns[:-1] - columns[-1:]).T
