"""Copies of attached models: pickled, saved, copied deeply, made from a copied config; none of them is attached."""

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from child_processes import environment
from families import FAMILIES, prompts
from placed_hooks import hooks_of

from pikv_hf import PiKVCache, attach, detach
from pikv_hf.integration.attachment import attachment_of

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 8}
INPUTS = prompts(batch=2, length=20)


def unpickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: list[Callable[[Any], Any]] = [unpickled, saved, copy.deepcopy]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("when", ["before", "attached", "filled", "detached"])
def test_copies_are_working_models(copied: Callable[[Any], Any], when: str) -> None:
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**INPUTS, **OPTIONS)
    if when != "before":
        cache = PiKVCache.for_model(model, **SMALL)
    if when == "filled":
        model.generate(**INPUTS, past_key_values=cache, **OPTIONS)
    if when == "detached":
        detach(model)
    twin = copied(model)
    assert attachment_of(twin) is None
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(twin.generate(**INPUTS, **OPTIONS), expected)
    assert hooks_of(twin) == 0, "hooks of the model that was copied are still there"
    own = PiKVCache.for_model(twin, **SMALL)
    assert torch.equal(twin.generate(**INPUTS, past_key_values=own, **OPTIONS), expected)
    detach(twin)
    assert hooks_of(twin) == 0
    assert attachment_of(model) is not attachment_of(twin)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", None])
def test_a_copied_config_has_the_implementation_of_before(implementation: str | None) -> None:
    model = FAMILIES["qwen3_moe"].build()
    model.config._attn_implementation = implementation
    attach(model)
    assert model.config._attn_implementation == "pikv"
    for twin in (copy.deepcopy(model.config), unpickled(model.config)):
        assert twin._attn_implementation == implementation
    detach(model)
    assert model.config._attn_implementation == implementation


def test_a_copy_tells_the_caches_of_the_original_nothing() -> None:
    """Its routers run while a layer of the original waits for its own."""
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**INPUTS, **OPTIONS)
    cache = PiKVCache.for_model(model, **SMALL)
    twin = copy.deepcopy(model)
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: twin(**INPUTS) and None)
    assert torch.equal(model.generate(**INPUTS, past_key_values=cache, **OPTIONS), expected)


def test_a_copy_of_a_copy_that_was_never_called() -> None:
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**INPUTS, **OPTIONS)
    PiKVCache.for_model(model)
    twin = unpickled(copy.deepcopy(unpickled(model)))
    cache = PiKVCache.for_model(twin, **SMALL)
    assert torch.equal(twin.generate(**INPUTS, past_key_values=cache, **OPTIONS), expected)


CHILD = """
import pickle, sys, torch
model, inputs, options, expected = pickle.load(open(sys.argv[1], "rb"))
hook = [module.register_forward_hook(lambda module, args, output: None) for module in model.modules()]
assert model.config._attn_implementation == "sdpa"
assert torch.equal(model.generate(**inputs, **options), expected)
from pikv_hf import PiKVCache
assert torch.equal(model.generate(**inputs, past_key_values=PiKVCache.for_model(model), **options), expected)
"""


@pytest.mark.slow
def test_another_process_unpickles_a_model(tmp_path: Path) -> None:
    """It counts hooks anew, and registers some of its own."""
    model = FAMILIES["qwen3_moe"].build()
    expected = model.generate(**INPUTS, **OPTIONS)
    attach(model)
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps((model, INPUTS, OPTIONS, expected)))
    run = [sys.executable, "-P", "-c", CHILD, os.fspath(path)]
    subprocess.run(run, env=environment(), check=True)


def test_saved_weights_are_those_of_a_model_that_was_never_attached(tmp_path: Path) -> None:
    model = FAMILIES["qwen3_moe"].build()
    expected, names = model.generate(**INPUTS, **OPTIONS), list(model.state_dict())
    PiKVCache.for_model(model)
    assert list(model.state_dict()) == names
    model.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    assert "pikv" not in (tmp_path / "config.json").read_text()
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert attachment_of(twin) is None
    assert torch.equal(twin.generate(**INPUTS, **OPTIONS), expected)
    cache = PiKVCache.for_model(twin, **SMALL)
    assert torch.equal(twin.generate(**INPUTS, past_key_values=cache, **OPTIONS), expected)


def test_a_copy_whose_first_call_fails_says_why() -> None:
    """Its hooks go with a call: none while torch goes through those that a failed forward has."""
    model = FAMILIES["qwen3_moe"].build()
    PiKVCache.for_model(model)
    twin = copy.deepcopy(model)
    twin.model.layers[0].self_attn.q_proj = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        twin(**prompts(2, 8))
    twin.model.layers[0].self_attn.q_proj = copy.deepcopy(model.model.layers[0].self_attn.q_proj)
    twin(**prompts(2, 8))
    assert hooks_of(twin) == 0
