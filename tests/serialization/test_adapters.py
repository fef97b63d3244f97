"""A cache is loaded under the adapters that it was saved under, and under no others."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_models import KINDS, STATES, adapted_model, base_model, scaled
from edited_files import rewritten
from families import FAMILIES
from golden_caches import GOLDEN, load, model_of
from peft_versions import needs_peft
from safetensors import safe_open
from saved_runs import go_on, new_cache, read
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.serialization.model_fingerprint import Fingerprint
from pikv_hf.serialization.tensor_file import CacheFileError

pytestmark = [pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"), needs_peft]

#: States in which a model computes the same, whatever lies idle in it.
NO_ADAPTER = ("never adapted", "disabled", "in transformers, disabled")

#: States in which it computes the same but for rounding, with other weights.
MERGED = ("A", "A merged", "A unloaded")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Return, for each state of a model, a cache that was saved in it, and how it went on."""
    folder, found = tmp_path_factory.mktemp("saved"), {}
    for state, context in STATES.items():
        with context() as model:
            cache = read(model, new_cache(model), tokens=60, batch=1)
            cache.save(folder / state)
            found[state] = folder / state, go_on(model, cache)
    return found


@functools.cache
def prints() -> dict[str, Fingerprint]:
    found = {}
    for state, context in STATES.items():
        with context() as model:
            found[state] = Fingerprint.of(model)
    return found


def assert_alike(one: torch.Tensor, other: torch.Tensor) -> None:
    # Pages of a loaded cache lie closer together, so that sums may be taken in another order.
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert torch.equal(one.argmax(-1), other.argmax(-1))


@pytest.mark.parametrize("state", STATES)
def test_a_cache_goes_on_in_the_state_that_it_was_saved_in_and_in_no_other(state: str, saved: Any) -> None:
    with STATES[state]() as model:
        assert_alike(go_on(model, PiKVCache.load(saved[state][0], model)), saved[state][1])
        for other, (path, expected) in saved.items():
            if state in NO_ADAPTER and other in NO_ADAPTER:
                assert_alike(go_on(model, PiKVCache.load(path, model)), expected)
            elif other != state:
                with pytest.raises(CacheFileError, match=re.escape(f"{path} was saved with another model: ")) as error:
                    PiKVCache.load(path, model)
                if not {state, other} & {"A unloaded", "A merged"}:
                    assert re.search(r"'A'|'B'", str(error.value))


def test_the_states_are_different_models(saved: Any) -> None:
    """Else the refusals above would refuse what is right."""
    for state, other in itertools.combinations(STATES, 2):
        if not any({state, other} <= set(alike) for alike in (NO_ADAPTER, MERGED)):
            with pytest.raises(AssertionError):
                torch.testing.assert_close(saved[state][1], saved[other][1], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        ("A", "B", "with adapter 'A' (scaling 8.0) active, where this one has adapter 'B' (scaling 8.0) active"),
        ("A", "disabled", "with adapter 'A' (scaling 8.0) active, where this one has no adapter active"),
        ("never adapted", "A", "with no adapter active, where this one has adapter 'A' (scaling 8.0) active"),
        ("A", "A, scaled", "adapter 'A' (scaling 8.0) active, where this one has adapter 'A' (scaling 4.0) active"),
        (
            "A merged",
            "A",
            "with adapter 'A' (scaling 8.0, merged) active, where this one has adapter 'A' (",
        ),
        ("both", "A", "with adapters 'A' (scaling 8.0) and 'B' (scaling 8.0) active, where"),
        ("A", "A, trained on", "adapter 'A' (scaling 8.0) has other weights than there: their digests are "),
        ("by layer", "both", "adapter 'A' (scaling 8.0) adapted 3 modules there and adapts 6 here"),
        ("A unloaded", "never adapted", "the digest of the weights of model.layers.0 is "),
    ],
)
def test_a_refusal_names_both(there: str, here: str, message: str) -> None:
    assert message in prints()[there].differences(prints()[here])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(kind: str, tmp_path: Path) -> None:
    """The adapter is known and changes what is computed; one whose weights differ is another."""
    model = adapted_model(kind)
    cache = read(model, new_cache(model), tokens=60, batch=1)
    cache.save(tmp_path / "cache")
    expected = go_on(model, cache)
    again = adapted_model(kind)
    assert_alike(go_on(again, PiKVCache.load(tmp_path / "cache", again)), expected)
    again.set_adapter("B")
    with pytest.raises(CacheFileError, match=r"with adapter 'A'.* active, where this one has adapter 'B'.* active"):
        PiKVCache.load(tmp_path / "cache", again)
    with again.disable_adapter(), pytest.raises(CacheFileError, match=r"this one has no adapter active"):
        PiKVCache.load(tmp_path / "cache", again)
    other = adapted_model(kind, seed=5)
    with pytest.raises(CacheFileError, match=r"adapter 'A'.* has other weights than there"):
        PiKVCache.load(tmp_path / "cache", other)
    with other.disable_adapter():
        assert Fingerprint.of(base_model()).differences(Fingerprint.of(other)) == ""


def test_adapters_that_lie_idle_do_not_count(tmp_path: Path) -> None:
    model = adapted_model()
    read(model, new_cache(model), tokens=60).save(tmp_path / "cache")
    model.delete_adapter("B")
    PiKVCache.load(tmp_path / "cache", model)
    model.add_adapter("C", KINDS["lora"]())
    PiKVCache.load(tmp_path / "cache", model)


SWITCHES: dict[str, Callable[[Any], Any]] = {
    "another": lambda model: model.set_adapter("B"),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "another scale": lambda model: scaled(model, 0.5),
    "merged": lambda model: model.merge_adapter(),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_cache_filled_under_another_adapter_is_not_saved_as_of_this_one(switch: str, tmp_path: Path) -> None:
    model = adapted_model()
    cache = read(model, new_cache(model), tokens=60)
    SWITCHES[switch](model)
    for each in (cache, cache.fork()):
        with pytest.raises(ValueError, match=r"with adapter 'A' \(scaling 8.0\) active, where this one has .* active"):
            each.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    cache.crop(-cache.get_seq_length())
    cache.save(tmp_path / "empty")
    read(model, cache, tokens=60)
    cache.save(tmp_path / "cache")
    PiKVCache.load(tmp_path / "cache", model).save(tmp_path / "again")


def test_a_cache_converted_under_an_adapter(tmp_path: Path) -> None:
    """Nobody has told under which adapter another cache was filled."""
    model = adapted_model()
    cache = PiKVCache.from_cache(model, read(model, DynamicCache(config=model.config), tokens=60), placement="hash")
    cache.save(tmp_path / "cache")
    PiKVCache.load(tmp_path / "cache", model)


# Files and constants


def test_older_files_say_nothing_of_adapters() -> None:
    model = model_of("plain")
    config = peft.LoraConfig(target_modules=["k_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config, adapter_name="A").eval()
    with pytest.raises(CacheFileError, match=r"up to version 3 do not say .* adapter 'A' \(scaling 4.0\) active"):
        load(adapted, GOLDEN / "3", "plain")
    with adapted.disable_adapter():
        load(adapted, GOLDEN / "3", "plain")


def test_a_file_says_which_adapters(saved: Any, tmp_path: Path) -> None:
    with safe_open(saved["both"][0], framework="pt") as file:
        adapters = json.loads(file.metadata()["model"])["adapters"]
    assert [(each["name"], each["merged"], each["scaling"], each["modules"]) for each in adapters] == [
        ("A", False, [8.0], 6),
        ("B", False, [8.0], 6),
    ]
    assert [re.fullmatch("[0-9a-f]{16}", each["digest"]) is not None for each in adapters] == [True, True]
    assert [dataclasses.asdict(each) for each in prints()["both"].adapters or ()] == adapters
    # A file whose adapters have keys that this release does not know is refused, and so is one without some.
    path = rewritten(saved["both"][0], tmp_path / "cache", lambda layers, tensors: None, {"model": '{"config": {}}'})
    with pytest.raises(CacheFileError, match="the model's fingerprint lacks the keys"), STATES["both"]() as model:
        PiKVCache.load(path, model)


def change_rope(model: Any) -> None:
    model.model.rotary_emb.inv_freq /= 4


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rope frequencies": (change_rope, "some numbers of model.rotary_emb.inv_freq is"),
    "rope rounded": (lambda m: m.model.rotary_emb.to(torch.bfloat16), "some numbers of model.rotary_emb.inv_freq is"),
    "rope factor": (lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.5), "rotary_emb.attention_scaling is"),
    "config": (lambda m: m.config.rope_parameters.update(rope_theta=5.0), "rope_parameters is"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_else_changes_keys_and_values(change: str) -> None:
    model = base_model()
    before = Fingerprint.of(model)
    CHANGES[change][0](model)
    assert CHANGES[change][1] in before.differences(Fingerprint.of(model))


def test_frequencies_that_vary_with_the_length_are_left_out() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = FAMILIES["qwen3_moe"].build(max_position_embeddings=32, rope_parameters=rope)
    before = Fingerprint.of(model)
    read(model, new_cache(model), tokens=80)
    assert before.differences(Fingerprint.of(model)) == ""
    assert before.constants
