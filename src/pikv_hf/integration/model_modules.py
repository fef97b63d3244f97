"""Finding what PiKV hooks into in a model: its attention modules, their configs, and the expert routers beside them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .expert_router import ExpertRouter, find_expert_router

#: Where wrappers have what they wrap: DistributedDataParallel, DataParallel and engines; torch.compile; PEFT, twice.
_WRAPPED = ("module", "_orig_mod", "base_model", "model")


def unwrapped(model: Any) -> Any:
    """Return the transformers model in a wrapper, or in several, of `torch`, accelerate or PEFT.

    Raises
    ------
    TypeError
        For what is no model.
    """
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, PreTrainedModel):
        inner = next((found for name in _WRAPPED if (found := getattr(inner, name, None)) is not None), None)
    if isinstance(inner, PreTrainedModel):
        return inner
    if isinstance(model, nn.Module) and hasattr(getattr(model, "config", None), "get_text_config"):
        return model
    raise TypeError(
        "expected a transformers model, or one in a wrapper of DistributedDataParallel, torch.compile or PEFT, got "
        f"{type(model).__module__}.{type(model).__qualname__}"
    )


def check_supported(config: Any) -> None:
    """Raise `ValueError` for architectures whose state is not a K/V cache of decoder self-attention."""
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; PiKVCache holds the K/V of decoder-only models")
    text = config.get_text_config(decoder=True)
    known = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = set(getattr(text, "layer_types", None) or ()) | set(getattr(text, "layers_block_type", None) or ())
    if unknown := sorted(kinds - known - {"attention"}):
        raise ValueError(f"{name} has layers of type {', '.join(unknown)}; PiKVCache knows {', '.join(sorted(known))}")
    stateful = [key for key in ("mamba_d_state", "ssm_state_size", "state_size") if hasattr(text, key)]
    if stateful:
        raise ValueError(f"{name} keeps recurrent state ({stateful[0]}={getattr(text, stateful[0])}), not only K/V")


def find_attention_modules(model: Any) -> dict[int, tuple[str, nn.Module]]:
    """Return name and module of the decoder's self-attention by layer index."""
    text = model.config.get_text_config(decoder=True)
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "Attention" in type(module).__name__ and _config_of(module, text) is text:
            found[index] = name, module
    return found


def _config_of(module: nn.Module, default: Any) -> Any:
    return getattr(module, "config", default)


def find_attention_configs(model: Any) -> dict[int, Any]:
    """Return the config that each decoder layer's attention reads, by layer index.

    Raises
    ------
    ValueError
        If the model has no decoder self-attention, or none that uses transformers' attention interface.
    """
    modules = find_attention_modules(model)
    if not modules:
        seen = sorted({type(m).__name__ for m in model.modules() if "Attention" in type(m).__name__})
        raise ValueError(f"{type(model).__name__} has no decoder self-attention that can be attached; seen: {seen}")
    can_set = getattr(model, "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be "
            "replaced; PiKVCache(config=model.config) works with it as it is"
        )
    text = model.config.get_text_config(decoder=True)
    return {index: _config_of(module, text) for index, (_, module) in modules.items()}


def _decoder_layers(model: Any) -> dict[int, tuple[list[nn.Module], nn.Module]]:
    """Return, by layer index, the modules around the layer's attention alone, innermost first, and the attention."""
    modules = find_attention_modules(model)
    every = {id(attention) for _, attention in modules.values()}
    layers = {}
    for index, (name, attention) in modules.items():
        around = []
        while name := name.rpartition(".")[0]:
            ancestor = model.get_submodule(name)
            if any(id(module) in every and module is not attention for module in ancestor.modules()):
                break
            around.append(ancestor)
        layers[index] = around, attention
    return layers


def find_expert_routers(model: Any) -> dict[int, ExpertRouter]:
    """Return the expert routers of the decoder layers that have one, by layer index."""
    text = model.config.get_text_config(decoder=True)
    routers = {}
    for index, (around, attention) in _decoder_layers(model).items():
        found = (find_expert_router(layer, attention, text) for layer in around)
        if (router := next(filter(None, found), None)) is not None:
            routers[index] = router
    return routers


def feed_forward_classes(model: Any) -> list[str]:
    """Return the class names in the decoder layers outside of attention, for messages about missing routers."""
    names: set[str] = set()
    for around, attention in _decoder_layers(model).values():
        inside = set(attention.modules())
        names |= {type(m).__name__ for layer in around for m in layer.modules() if m not in inside}
    return sorted(names)
