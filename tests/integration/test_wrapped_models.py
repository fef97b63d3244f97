"""Wrappers of models: those of torch, accelerate and PEFT are looked into, other objects refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, prompts
from torch import nn

from pikv_hf import PiKVCache, attach, detach
from pikv_hf.integration.attachment import attachment_of

SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 8}
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
INPUTS = prompts(batch=2, length=20)


@pytest.fixture(scope="module", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = f"file://{tmp_path_factory.mktemp('group') / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def lora(model: Any) -> Any:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def mixed_lora(model: Any) -> Any:
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    return peft.get_peft_model(model, config, mixed=True)


def prepared(model: Any) -> Any:
    return accelerate.Accelerator(cpu=True).prepare(model)


def compilable(name: str) -> Any:
    """Return a model whose experts torch.compile can trace: grouped products are for bfloat16 alone there."""
    model = FAMILIES[name].build()
    model.config._experts_implementation = "eager"
    return model


WRAPPERS: list[Any] = [
    nn.parallel.DistributedDataParallel,
    nn.DataParallel,
    pytest.param(compiled, marks=pytest.mark.slow),
    lora,
    mixed_lora,
    prepared,
    lambda model: nn.DataParallel(lora(model)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_looked_into(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    model = compilable("qwen3_moe")
    wrapped = wrap(model)
    expected = model.generate(**INPUTS, **OPTIONS)
    with torch.no_grad():
        logits = wrapped(**INPUTS).logits

    cache = PiKVCache.for_model(wrapped, **SMALL)
    assert cache.attachment is attachment_of(model) is PiKVCache.for_model(model).attachment
    assert attach(wrapped) is attachment_of(wrapped)
    with torch.no_grad():
        assert (wrapped(**INPUTS, past_key_values=cache).logits - logits).abs().max() <= 1e-4
    cache.save(tmp_path / "cache")
    again = PiKVCache.load(tmp_path / "cache", wrapped)
    assert torch.equal(again.layers[0].dense()[0], cache.layers[0].dense()[0])
    fresh = PiKVCache.for_model(wrapped, **SMALL)
    assert torch.equal(model.generate(**INPUTS, past_key_values=fresh, **OPTIONS), expected)
    detach(wrapped)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "llama"])
def test_compiled_forward_says_the_same(name: str) -> None:
    model = compilable(name)
    expected = model.generate(**INPUTS, **OPTIONS)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    cache = PiKVCache.for_model(model, placement="expert" if FAMILIES[name].routed else "hash", **SMALL)
    assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **OPTIONS), expected)


@pytest.mark.parametrize("given", ["gpt2", None, nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2)), dict])
def test_what_is_no_model_is_refused(given: Any) -> None:
    for function in (PiKVCache.for_model, attach, detach, lambda model: PiKVCache.load("cache", model)):
        with pytest.raises(TypeError, match=r"expected a (transformers )?model.*, got"):
            function(given)
