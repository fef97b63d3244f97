"""Finding what PiKV hooks into in a model: its attention modules, their configs, and the expert routers beside them."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..layer.own_layer import has_positions, is_indexed, is_state_layer, layers_of
from .attention_code import calls_interface, only_indexes, takes_cache, why_not_in_place
from .decoder_modules import decoder_modules
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
        # Submodules, not attributes: wrappers hand on those of what they wrap, and a model has a `base_model` itself.
        inner = next((found for name in _WRAPPED if (found := inner._modules.get(name)) is not None), None)
    if isinstance(inner, PreTrainedModel):
        return inner
    if isinstance(model, nn.Module) and hasattr(getattr(model, "config", None), "get_text_config"):
        return model
    if isinstance(model, str):
        raise TypeError(
            f"expected a model, got the text {model!r}: load it first, "
            f"model = AutoModelForCausalLM.from_pretrained({model!r})"
        )
    if isinstance(model, PreTrainedConfig):
        raise TypeError(
            f"expected a model, got its config ({type(model).__name__}): load the model first; PiKVCache(config) makes "
            "a cache without attaching one"
        )
    raise TypeError(
        "expected a transformers model, or one in a wrapper of DistributedDataParallel, torch.compile or PEFT, got "
        f"{type(model).__module__}.{type(model).__qualname__}"
    )


def check_modules(model: Any) -> None:
    """Raise `ValueError` for models that PiKV's attention cannot be put into, by what their modules do with the cache.

    Every module that is handed the cache has to be an attention that PiKV's can stand in for: nothing else keeps its
    state there, whatever fields the config has.
    """
    layers = layers_of(model.config)
    name, found = type(model).__name__, find_attention_modules(model)
    advice = "PiKVCache(config=model.config) works with it as it is"
    by_layer = _attention_by_layer(model)
    # Layers beyond those of the cache read what others have stored, in models that say so.
    counted = max(len(layers), model.config.get_text_config(decoder=True).num_hidden_layers)
    _check_one_for_each_layer(name, by_layer, counted)
    keepers = [module for module in _state_keepers(model) if not _keeps_in_layer(module, layers)]
    if others := sorted({type(module).__name__ for module in keepers}):
        raise ValueError(
            f"{name} hands the cache to {', '.join(others)}, which PiKV's attention cannot stand in for; if it works "
            f"with DynamicCache, {advice}"
        )
    if not found:
        raise ValueError(
            f"{name} has no decoder self-attention that uses transformers' attention interface; if it works with "
            f"DynamicCache, {advice}"
        )
    keeps_own = not getattr(model, "_supports_default_dynamic_cache", lambda: True)()
    if keeps_own and not getattr(model, "_is_stateful", False):
        raise ValueError(f"{name} keeps its state in a cache of its own, not in one of transformers'")
    for path, attention in found.values():
        reason = why_not_in_place(attention)
        if not getattr(attention, "is_causal", True):
            # Without a mask such a module sees later tokens too, in a call as in transformers' SDPA.
            reason = "is not causal (is_causal=False)"
        if reason is not None:
            raise ValueError(f"{path} ({type(attention).__name__}) {reason}; {advice}")


def find_attention_modules(model: Any) -> dict[int, tuple[str, nn.Module]]:
    """Return name and module of the decoder's self-attention by layer index.

    Where a layer has cross-attention too, which has the same index, that is the causal one.
    """
    return {index: group[0] for index, group in _attention_by_layer(model).items()}


def _check_one_for_each_layer(name: str, by_layer: dict[int, list[tuple[str, nn.Module]]], layers: int) -> None:
    """Raise `ValueError` where modules share a layer of the cache, as copied ones do, or have none in it."""
    for index, group in by_layer.items():
        causal = [path for path, module in group if getattr(module, "is_causal", True)]
        if len(causal) > 1:
            raise ValueError(
                f"{name} has {len(causal)} attention modules with layer_idx={index}: {', '.join(causal)}; each stores "
                "its tokens in a layer of the cache of its own: number them, and count them in num_hidden_layers"
            )
        if index >= layers:
            raise ValueError(
                f"{name} has attention with layer_idx={index}, {group[0][0]}, and its config counts {layers} layers; "
                "set num_hidden_layers (and layer_types, if it has them)"
            )


def _attention_by_layer(model: Any) -> dict[int, list[tuple[str, nn.Module]]]:
    """Return names and modules of the decoder's attention by layer index, causal ones first."""
    found: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in decoder_modules(model):
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and calls_interface(module):
            found.setdefault(index, []).append((name, module))
    for group in found.values():
        group.sort(key=lambda named: not getattr(named[1], "is_causal", True))
    return found


def first_state(model: Any) -> float:
    """Return the first layer that has something else than attention with a state of its own, infinity if none has."""
    return min((getattr(module, "layer_idx", 0) for module in _state_keepers(model)), default=math.inf)


def _state_keepers(model: Any) -> Iterator[nn.Module]:
    """Yield the modules that are handed the cache for themselves, neither attention nor what is around it."""
    attention = {id(module) for group in _attention_by_layer(model).values() for _, module in group}
    for _, module in decoder_modules(model):
        inside = list(module.modules())[1:]
        passes_on = any(id(part) in attention or takes_cache(part) for part in inside)
        if takes_cache(module) and not passes_on and id(module) not in attention:
            yield module


def _keeps_in_layer(module: nn.Module, layers: list[Any]) -> bool:
    """Return whether what a module has in the cache is a state in a layer of transformers' own, or nothing.

    What is beside K/V in the layer of an indexer is paged with them.
    """
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int) or index >= len(layers):
        return False
    if is_indexed(layers[index]) and only_indexes(type(module)):
        return True
    return is_state_layer(layers[index]) or not has_positions(layers[index])


def find_attention_configs(model: Any) -> dict[int, Any]:
    """Return the config that each decoder layer's attention reads, by layer index; copied layers have their own."""
    text = model.config.get_text_config(decoder=True)
    return {index: getattr(module, "config", text) for index, (_, module) in find_attention_modules(model).items()}


def _decoder_layers(model: Any) -> dict[int, tuple[list[nn.Module], nn.Module]]:
    """Return, by layer index, the modules around the layer's attention, innermost first, and the attention.

    They end below what holds all decoder layers: a decoder layer may have several attentions (LongCat).
    """
    modules, layers, stack = find_attention_modules(model), {}, len(_path_to_layers(model))
    for index, (name, attention) in modules.items():
        path = name.split(".")
        inner = range(len(path) - 1, stack, -1)
        layers[index] = [model.get_submodule(".".join(path[:end])) for end in inner], attention
    return layers


def find_modules_around(model: Any) -> list[nn.Module]:
    """Return the modules that are called around all decoder layers, the model first."""
    path = _path_to_layers(model)
    around = [model.get_submodule(".".join(path[:end])) for end in range(len(path) + 1)]
    return [module for module in around if not isinstance(module, nn.ModuleList)]


def _path_to_layers(model: Any) -> list[str]:
    """Return the names of the modules, below the model, that hold all decoder layers."""
    paths = [name.split(".") for name, _ in find_attention_modules(model).values()]
    common = [parts[0] for parts in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*paths, strict=False))]
    # A single layer, with one attention or several, is in a list of layers all the same.
    return list(itertools.takewhile(_is_name, common))


def _is_name(part: str) -> bool:
    """Return whether a part of a module's path is a name, not a number in a list."""
    return not part.isdigit()


def find_expert_routers(model: Any) -> dict[int, ExpertRouter]:
    """Return the expert routers of the decoder layers that have one, by layer index.

    Of several attentions of a decoder layer the first has its router: the others place tokens by position.
    """
    text = model.config.get_text_config(decoder=True)
    routers: dict[int, ExpertRouter] = {}
    for index, (around, attention) in sorted(_decoder_layers(model).items()):
        found = (find_expert_router(layer, attention, text) for layer in around)
        router = next(filter(None, found), None) or _router_after(model, index, text)
        if router is not None and all(router.module is not other.module for other in routers.values()):
            routers[index] = router
    return routers


def _router_after(model: Any, index: int, text: Any) -> ExpertRouter | None:
    """Return the router in a block that follows an attention block, before the next attention, as Nemotron-H has it."""
    modules = find_attention_modules(model)
    path = modules[index][0].split(".")
    place = next((place for place, part in enumerate(path) if part.isdigit()), 0)
    if not place or len(path) != place + 2:
        return None
    blocks = model.get_submodule(".".join(path[:place]))
    attending = {id(attention) for _, attention in modules.values()}
    for block in list(blocks)[int(path[place]) + 1 :]:
        if any(id(part) in attending for part in block.modules()):
            return None
        if (router := find_expert_router(block, modules[index][1], text)) is not None:
            return router.within(model.get_submodule(".".join(path[: place - 1])))
    return None


def feed_forward_classes(model: Any) -> list[str]:
    """Return the class names in the decoder layers outside of attention, for messages about missing routers."""
    names: set[str] = set()
    for around, attention in _decoder_layers(model).values():
        inside = set(attention.modules())
        names |= {type(m).__name__ for layer in around for m in layer.modules() if m not in inside}
    return sorted(names)
