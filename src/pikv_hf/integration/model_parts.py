"""What PiKV found in a model to hook into, by layer index, and whether the model still has it."""

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from .expert_router import ExpertRouter
from .model_modules import (
    find_attention_configs,
    find_attention_modules,
    find_expert_routers,
    find_modules_around,
    first_state,
)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelParts:
    """Attention modules and expert routers of a model's decoder layers. It does not keep the model alive.

    Two are equal if they name the same modules.

    Attributes
    ----------
    attention : dict of int to weakref
        The attention modules.
    routers : dict of int to ExpertRouter
        The expert routers, of layers that have one.
    configs : dict of int to PreTrainedConfig
        Where each attention module reads which implementation it is to use.
    first : int
        The first layer that attends.
    begins_with_state : bool
        Whether something with a state of its own comes before the first attention.
    around : list of weakref
        The modules around all decoder layers, the model first.
    """

    attention: dict[int, "weakref.ref[nn.Module]"]
    routers: dict[int, ExpertRouter]
    configs: dict[int, Any] = dataclasses.field(compare=False)
    first: int
    begins_with_state: bool
    around: list["weakref.ref[nn.Module]"]
    _every: list["weakref.ref[nn.Module]"] = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, model: Any) -> "ModelParts":
        """Return the parts of a model.

        Raises
        ------
        ValueError
            If it has no decoder self-attention, or none that uses transformers' attention interface.
        """
        configs, routers = find_attention_configs(model), find_expert_routers(model)
        attention = {index: weakref.ref(module) for index, (_, module) in find_attention_modules(model).items()}
        around = [weakref.ref(module) for module in find_modules_around(model)]
        every = [weakref.ref(module) for module in model.modules()]
        first = min(attention)
        return cls(attention, routers, configs, first, first_state(model) <= first, around, every)

    def may_be_stale(self, model: Any) -> bool:
        """Return whether the model has other modules than those that it had, of whatever kind: a matter of 1 ms."""
        return [reference() for reference in self._every] != list(model.modules())

    def around_modules(self) -> list[nn.Module]:
        """Return the modules around all decoder layers that are still there."""
        return [module for reference in self.around if (module := reference()) is not None]

    def every_config(self) -> Iterator[tuple[str, Any]]:
        """Yield all configs that say which attention and which masks are used, each with who reads it.

        Copied layers have configs of their own, apart from that of the model around, which makes the masks.
        """
        for index, config in self.configs.items():
            yield f"layer {index}", config
        for module in self.around_modules():
            if (config := getattr(module, "config", None)) is not None:
                yield type(module).__name__, config.get_text_config(decoder=True)

    def attention_modules(self) -> dict[int, nn.Module]:
        """Return the attention modules that are still there."""
        modules = {index: reference() for index, reference in self.attention.items()}
        return {index: module for index, module in modules.items() if module is not None}
