"""The bytes of the states of linear attention and convolutions, asked of the model's own modules without a device."""

from typing import Any

import torch
from transformers.cache_utils import Cache

from ..common.transformers_release import cache_argument
from ..integration.attention_code import calls_interface, takes_cache
from ..layer.own_layer import is_state_layer, state_tensors


@torch.no_grad()
def bytes_of_states(model: Any, layers: list[Any]) -> dict[int, int]:
    """Return the bytes that each layer with states keeps of a sequence, by layer index.

    Parameters
    ----------
    model : PreTrainedModel
        On the device `"meta"`: its layers with states read two tokens, of which there is nothing but the shape.
    layers : list
        Empty ones of a cache for it.

    Raises
    ------
    ValueError
        If a layer's module cannot be run so.
    """
    sizes = {}
    cache = Cache(layers=layers)
    hidden = torch.zeros(1, 2, int(model.config.get_text_config().hidden_size), dtype=model.dtype, device="meta")
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        inner = any(takes_cache(part) for part in list(module.modules())[1:])
        if not isinstance(index, int) or inner or not takes_cache(module) or calls_interface(module):
            continue
        if not is_state_layer(layers[index]):
            continue
        try:
            module(hidden, **cache_argument(cache))
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"layer {index}: what {type(module).__name__} keeps of a sequence cannot be told without running the "
                f"model: {str(error).splitlines()[0]}"
            ) from error
        sizes[index] = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(layers[index]).values())
    return sizes
