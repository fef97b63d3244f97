"""Small models with PEFT adapters in every state that an adapter can be in, the same each time one is built."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from families import FAMILIES

PROJECTIONS = ["q_proj", "k_proj", "v_proj"]
IN_ATTENTION = {"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"}

#: By kind, the config of an adapter that changes keys and values.
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=64, init_lora_weights=False, **IN_ATTENTION),
    "dora": lambda: peft.LoraConfig(r=8, lora_alpha=64, init_lora_weights=False, use_dora=True, **IN_ATTENTION),
    "experts": lambda: peft.LoraConfig(
        r=4, target_modules=["k_proj"], target_parameters=["mlp.experts.gate_up_proj"], init_lora_weights=False
    ),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False),
    "ia3": lambda: peft.IA3Config(
        target_modules=PROJECTIONS, feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
    ),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["k_proj"], init_weights=False, task_type="CAUSAL_LM"),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=PROJECTIONS, init_weights=False, task_type="CAUSAL_LM"),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=list(range(3, 60)), task_type="CAUSAL_LM"),
    "whole modules": lambda: peft.LoraConfig(
        r=8, target_modules=["v_proj"], modules_to_save=["embed_tokens"], init_lora_weights=False
    ),
}


def base_model() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=2)


def randomized(model: Any, adapter: str, seed: int) -> Any:
    """Give an adapter's weights values that depend on a seed only; some kinds begin with those that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if adapter in name.split("."):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return model


def adapted_model(kind: str = "lora", seed: int = 1) -> Any:
    """Return a `PeftModel` with the adapters `"A"`, which is active, and `"B"`."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base_model(), KINDS[kind](), adapter_name="A")
    model.add_adapter("B", KINDS[kind]())
    model.set_adapter("A")
    return randomized(randomized(model, "A", seed), "B", 2).eval()


def tuners(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]


def second_layer_has_b(model: Any) -> None:
    for name, module in model.named_modules():
        if "layers.1." in name and isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.set_adapter("B")


def scaled(model: Any, factor: float) -> None:
    for tuner in tuners(model):
        tuner.set_scale("A", factor)


@contextlib.contextmanager
def _changed(model: Any, change: Callable[[Any], Any]) -> Iterator[Any]:
    result = change(model)
    yield model if result is None else result


#: By state: a context with a model in that state, the same whenever it is built.
STATES: dict[str, Callable[[], Any]] = {
    "never adapted": lambda: contextlib.nullcontext(base_model()),
    "A": lambda: contextlib.nullcontext(adapted_model()),
    "A, trained on": lambda: contextlib.nullcontext(adapted_model(seed=3)),
    "A, scaled": lambda: _changed(adapted_model(), lambda model: scaled(model, 0.5)),
    "A merged": lambda: _changed(adapted_model(), lambda model: model.merge_adapter()),
    "A unloaded": lambda: _changed(adapted_model(), lambda model: model.merge_and_unload()),
    "B": lambda: _changed(adapted_model(), lambda model: model.set_adapter("B")),
    "both": lambda: _changed(adapted_model(), lambda model: model.base_model.set_adapter(["A", "B"])),
    "by layer": lambda: _changed(adapted_model(), second_layer_has_b),
    "in transformers": lambda: contextlib.nullcontext(in_transformers()),
    "in transformers, disabled": lambda: _changed(in_transformers(), lambda model: model.disable_adapters()),
    "disabled": lambda: disabled(),
}


@contextlib.contextmanager
def disabled() -> Iterator[Any]:
    model = adapted_model()
    with model.disable_adapter():
        yield model


def in_transformers() -> Any:
    """Return a model that transformers itself has given another adapter `"A"`, by `model.add_adapter`."""
    torch.manual_seed(0)
    model = base_model()
    model.add_adapter(KINDS["lora"](), "A")
    return randomized(model, "A", 4).eval()
