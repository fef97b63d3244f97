"""Which PEFT adapters take part in what a model computes, and its modules as they would be without any.

Adapters are known by their structure, so that PEFT need not be installed: a module of theirs lists `active_adapters`
and `merged_adapters`, and has the module that it adapts inside. That holds for those that `get_peft_model` makes and
for those that transformers itself loads (`model.load_adapter`).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .weight_digests import Weight, digests_of, stored_tensors

# What a module of an adapter calls the one that it adapts.
_ADAPTED = ("base_layer", "original_module", "token_adapter")


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that is in use.

    Attributes
    ----------
    name : str
        As PEFT knows it.
    merged : bool
        Whether its weights have been added to those of the model, whose digests then differ too.
    scaling : list of float
        The factors of its output in the modules that it adapts, without repetition; empty where its kind has none.
    modules : int
        How many modules it adapts.
    digest : str or None
        Of its weights and settings in each of these modules; None where they are not to be had.
    """

    name: str
    merged: bool
    scaling: list[float]
    modules: int
    digest: str | None

    def __str__(self) -> str:
        notes = [f"scaling {' and '.join(map(str, self.scaling))}"] if self.scaling else []
        notes += ["merged"] if self.merged else []
        return f"{self.name!r}" + (f" ({', '.join(notes)})" if notes else "")


def named(adapters: Sequence[Adapter]) -> str:
    """Name adapters in a sentence."""
    if not adapters:
        return "no adapter"
    return f"adapter{'s' if len(adapters) > 1 else ''} {' and '.join(map(str, adapters))}"


def difference(saved: Sequence[Adapter], here: Sequence[Adapter]) -> str:
    """Say in words how the adapters of a model differ from those that were saved; empty if they do not."""
    if list(saved) == list(here):
        return ""
    there, now = named(saved), named(here)
    if there != now:
        return f"with {there} active, where this one has {now} active"
    for one, other in zip(saved, here, strict=True):
        if one.modules != other.modules:
            return f"adapter {one} adapted {one.modules} modules there and adapts {other.modules} here"
        if None not in (one.digest, other.digest) and one.digest != other.digest:
            return f"adapter {one} has other weights than there: their digests are {one.digest} and {other.digest}"
    return ""


def _adapted(module: nn.Module) -> nn.Module | None:
    """Return the module that this one adapts, None if it is no adapter's."""
    kind = type(module)
    if not (hasattr(kind, "merged_adapters") and hasattr(kind, "active_adapters")):
        return None
    inside = (module._modules.get(name) for name in _ADAPTED)
    return next((each for each in inside if each is not None), None)


def modules_without_adapters(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module as `named_modules` would if the model had no adapters."""
    for prefix, each in _walk(module):
        if _adapted(each) is None:
            yield prefix, each


def adapters_now(model: Any) -> list[Adapter]:
    """Return the adapters in use as tokens come, without digests; PEFT leaves its configs on models that it adapts."""
    return adapters_in_use(model, with_digests=False) if hasattr(model, "peft_config") else []


def adapters_in_use(model: Any, with_digests: bool = True) -> list[Adapter]:
    """Return the adapters that take part in what a model computes, by name.

    Parameters
    ----------
    model : nn.Module
        The model of transformers, outside of wrappers.
    with_digests : bool
        Whether to look at their weights too.
    """
    found: list[tuple[str, Any]] = [(prefix, each) for prefix, each in _walk(model) if _adapted(each) is not None]
    weights: list[Weight] = []
    merged: set[str] = set()
    scaling: dict[str, set[float]] = defaultdict(set)
    modules: dict[str, int] = defaultdict(int)
    for prefix, layer in found:
        for name in _names_in_use(layer):
            own = _weights_of(layer, name)
            if not own:
                continue
            modules[name] += 1
            settings = _settings_of(layer, name)
            weights += [(name, f"{prefix}.{key} {sorted(settings.items())}", tensor) for key, tensor in own]
            merged |= {name} & set(layer.merged_adapters)
            if isinstance(factor := settings.get("scaling"), (int, float)):
                scaling[name].add(float(factor))
    digests = digests_of(weights) if with_digests else {}
    return [
        Adapter(name, name in merged, sorted(scaling[name]), modules[name], digests.get(name))
        for name in sorted(modules)
    ]


def _walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules with the names of those that they adapt, but not what belongs to adapters alone."""
    seen: set[int] = set()
    # A stack instead of recursion: the order is that of `named_modules`.
    stack = [("", module)]
    while stack:
        prefix, each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield prefix, each
        if (adapted := _adapted(each)) is not None:
            stack.append((prefix, adapted))
            continue
        children = [(name, child) for name, child in each._modules.items() if child is not None]
        stack += [(f"{prefix}.{name}".lstrip("."), child) for name, child in reversed(children)]


def _names_in_use(layer: Any) -> list[str]:
    """Return the adapters that a module of theirs computes with: what is merged hides what is active."""
    if layer.disable_adapters:
        return []
    return list(dict.fromkeys(layer.merged_adapters or layer.active_adapters))


def _weights_of(layer: nn.Module, adapter: str) -> list[tuple[str, torch.Tensor | None]]:
    """Return the weights of one adapter in a module; none if it does not adapt it."""
    inside = next(name for name in _ADAPTED if layer._modules.get(name) is not None)
    beside = [(name, child) for name, child in layer._modules.items() if child is not None and name != inside]
    own = [(key, tensor) for key, tensor in stored_tensors(layer) if adapter in key.split(".")]
    for name, child in beside:
        for path, part in child.named_modules(prefix=name):
            own += [(f"{path}.{key}", tensor) for key, tensor in stored_tensors(part)]
    return [(path, tensor) for path, tensor in own if adapter in path.split(".")]


def _settings_of(layer: Any, adapter: str) -> dict[str, Any]:
    """Return the plain numbers and words that a module keeps for one adapter, such as its scaling."""
    kept = {name: getattr(layer, name, None) for name in layer.other_param_names if "." not in name}
    chosen = {name: each.get(adapter) for name, each in kept.items() if isinstance(each, dict)}
    return {name: value for name, value in chosen.items() if isinstance(value, (bool, int, float, str))}
