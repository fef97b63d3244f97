"""All that DynamicCache and its layers offer in public works here too, or says in one line that it does not."""

from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pikv_hf import PiKVCache

#: How to call what wants arguments.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "batch_repeat_interleave": {"repeats": 2},
    "batch_select_indices": {"indices": torch.tensor([1])},
    "crop": {"max_length": -2},
    "early_initialization": {
        **{"batch_size": 2, "num_heads": 2, "head_dim": 16, "dtype": torch.float32, "device": torch.device("cpu")}
    },
    "get_mask_sizes": {"cache_position": torch.arange(30, 33), "layer_idx": 1},
    "get_seq_length": {"layer_idx": 1},
    "offload": {"layer_idx": 0, "only_non_sliding": False},
    "prefetch": {"layer_idx": 0, "only_non_sliding": False},
    "reorder_cache": {"beam_idx": torch.tensor([1, 0])},
    "update": {"key_states": torch.ones(2, 2, 3, 16), "value_states": torch.ones(2, 2, 3, 16), "layer_idx": 0},
    "lazy_initialization": {"key_states": torch.ones(2, 2, 3, 16), "value_states": torch.ones(2, 2, 3, 16)},
}
#: DynamicCache's fills its K/V with zeros and keeps their length: tests/integration/test_cache_reset.py.
OWN_WAY = {"reset"}
#: What calls begin with an empty cache.
FRESH = {"early_initialization", "lazy_initialization"}


def public(kind: type, instance: Any) -> list[str]:
    return [name for name in {*dir(kind), *vars(instance)} if not name.startswith("_")]


def filled(model: Any, cache: Any) -> Any:
    with torch.no_grad():
        model(prompts(2, 30)["input_ids"], past_key_values=cache)
    return cache


def outcome(owner: Any, name: str, layer: bool) -> Any:
    """Return what an attribute is or a method returns, and the length afterwards; errors as their kind."""
    try:
        found = getattr(owner, name)
        if callable(found) and not isinstance(found, type):
            given = {key: value for key, value in ARGUMENTS.get(name, {}).items() if not (layer and key == "layer_idx")}
            if layer:
                given.pop("only_non_sliding", None)
            found = found(**given)
        return found, owner.get_seq_length()
    except Exception as error:
        return error


def check(ours: Any, theirs: Any, name: str) -> None:
    if isinstance(theirs, Exception):
        return
    if isinstance(ours, NotImplementedError):
        assert "\n" not in str(ours)
        assert "PiKVCache" in str(ours), name
        return
    assert not isinstance(ours, Exception), f"{name}: {ours!r}"
    assert ours[1] == theirs[1], f"{name}: another length afterwards"
    same(ours[0], theirs[0], name)


def same(mine: Any, other: Any, name: str) -> None:
    if isinstance(other, torch.Tensor):
        assert torch.equal(mine, other), name
    elif isinstance(other, (tuple, list)) and name != "layers":
        assert len(mine) == len(other), name
        for left, right in zip(mine, other, strict=True):
            same(left, right, name)
    elif isinstance(other, (int, bool, str, torch.dtype, torch.device)) or other is None:
        assert mine == other, name


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_everything_that_dynamic_cache_has(family: str, attached: bool) -> None:
    model = FAMILIES[family].build()

    def make() -> PiKVCache:
        return PiKVCache.for_model(model, page_size=8) if attached else PiKVCache(model.config)

    names = set(public(DynamicCache, DynamicCache(config=model.config)))
    assert {"crop", "is_initialized", "is_sliding", "update"} <= names
    for name in sorted(names - OWN_WAY):
        caches = make(), DynamicCache(config=model.config)
        if name not in FRESH:
            caches = tuple(filled(model, cache) for cache in caches)
        check(*(outcome(cache, name, layer=False) for cache in caches), name)
    ours, theirs = filled(model, make()), filled(model, DynamicCache(config=model.config))
    assert len(ours) == len(theirs)
    assert bool(ours)
    assert len(list(ours)) == len(list(theirs))


@pytest.mark.parametrize("attached", [True, False])
def test_everything_that_its_layers_have(attached: bool) -> None:
    model = FAMILIES["qwen3_moe"].build()

    def make() -> PiKVCache:
        return PiKVCache.for_model(model, page_size=8) if attached else PiKVCache(model.config)

    names = set(public(DynamicLayer, filled(model, DynamicCache(config=model.config)).layers[0]))
    assert {"device", "keys", "values", "crop", "update"} <= names
    for name in sorted(names - OWN_WAY):
        caches = make(), DynamicCache(config=model.config)
        if name not in FRESH:
            caches = tuple(filled(model, cache) for cache in caches)
        if name == "update" and attached:
            # The model alone may call it: it answers PiKV's attention.
            continue
        check(*(outcome(cache.layers[0], name, layer=True) for cache in caches), name)


def test_early_initialization_before_the_first_tokens() -> None:
    """Of the right format it changes nothing."""
    model = FAMILIES["gpt_oss"].build()
    inputs, options = prompts(2, 30), {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **options)
    cache = PiKVCache.for_model(model, page_size=8)
    cache.early_initialization(**ARGUMENTS["early_initialization"])
    assert cache.is_initialized
    assert torch.equal(model.generate(**inputs, past_key_values=cache, **options), expected)


# Making one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: PiKVCache(), r"made by PiKVCache.for_model\(model\), or .* by PiKVCache\(model.config\)"),
        (lambda model: PiKVCache(model), r"for a Qwen3MoeForCausalLM use PiKVCache.for_model\(model\)"),
        (
            lambda model: PiKVCache("some/model"),
            r"got 'some/model' \(str\); load the model, and use PiKVCache.for_model",
        ),
        (lambda model: PiKVCache(model.config, page_size=64), r"PiKVCache\(config, PiKVConfig\(page_size=64\)\); .*"),
        (lambda model: PiKVCache(model.config, {"page_size": 64}), "pikv_config must be a PiKVConfig, got dict"),
        (lambda model: PiKVCache.for_model("some/model"), r"AutoModelForCausalLM.from_pretrained\('some/model'\)"),
        (
            lambda model: PiKVCache.for_model(model.config),
            r"its config \(Qwen3MoeConfig\): .* PiKVCache\(config\) makes",
        ),
    ],
)
def test_what_makes_no_cache_is_told_what_does(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make(FAMILIES["qwen3_moe"].build())


def test_what_a_cache_prints() -> None:
    model = FAMILIES["qwen3_moe"].build()
    assert repr(PiKVCache(model.config)) == "PiKVCache(3 layers, 3 of them paged, 0 tokens seen, placement='hash')"
    cache = filled(model, PiKVCache.for_model(model, budget="50%", recent_window=0))
    assert repr(cache) == (
        "PiKVCache(3 layers, 3 of them paged, 30 tokens seen, "
        "placement='expert', scheduler='joint', recent_window=0, budget='50%')"
    )
