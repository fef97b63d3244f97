"""How an attention module's output projection measures what a head returns."""

import torch
from torch import nn

from ..common.foreign_attributes import GRAM_ATTRIBUTE
from .eviction_loss import output_gram


def gram_of(module: nn.Module, query_heads: int, value_dim: int) -> torch.Tensor:
    """Return `(Hq, Dv, Dv)`, how the output projection measures a head's output; the identity if there is none."""
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[1] != query_heads * value_dim:
        known_device = next((parameter.device for parameter in module.parameters()), None)
        return torch.eye(value_dim, device=known_device).expand(query_heads, -1, -1)
    known = getattr(module, GRAM_ATTRIBUTE, None)
    # Computed once per weight; training it further changes the version.
    if known is None or known[0] != (weight.data_ptr(), weight._version):
        known = (weight.data_ptr(), weight._version), output_gram(weight.detach(), query_heads)
        setattr(module, GRAM_ATTRIBUTE, known)
    return known[1]
