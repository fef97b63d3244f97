"""Unsupported things say so, naming both values, and leave the cache as it was."""

from typing import Any

import pytest
import torch
import transformers
from families import COMMON, FAMILIES, prompts

from pikv_hf import PiKVCache, PiKVConfig, attach

SMALL = {"page_size": 8, "recent_window": 8}


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build()


@pytest.fixture
def filled(model: Any) -> PiKVCache:
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
    return cache


def snapshot(cache: PiKVCache) -> list[Any]:
    state: list[Any] = [cache.get_seq_length(), cache.nbytes]
    for layer in cache.layers:
        keys, values = layer.dense()
        state += [keys.clone(), values.clone(), layer.table.plain.allocator.refcount.copy().tolist()]
    return state


def assert_unchanged(cache: PiKVCache, before: list[Any]) -> None:
    for then, now in zip(before, snapshot(cache), strict=True):
        assert torch.equal(then, now) if torch.is_tensor(then) else then == now


def call(model: Any, cache: PiKVCache, tokens: int = 1, batch: int = 3) -> Any:
    """Call a model with new tokens and a mask that goes on to hide the prompt's padding."""
    mask = prompts()["attention_mask"]
    mask = torch.nn.functional.pad(mask, (0, cache.get_seq_length() + tokens - mask.shape[1]), value=1)[:batch]
    return model(input_ids=torch.full((batch, tokens), 5), attention_mask=mask, past_key_values=cache)


def decode(model: Any, cache: PiKVCache, tokens: int, steps: int) -> None:
    for _ in range(steps):
        call(model, cache, tokens)


def kv(batch: int = 3, heads: int = 2, tokens: int = 1, dim: int = 16, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(batch, heads, tokens, dim, **kwargs)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (kv(batch=2), kv(batch=2), r"\(2, 2, 16, 16\), but the cache holds \(3, 2, 16, 16\)"),
        (kv(heads=4), kv(heads=4), r"\(3, 4, 16, 16\), but the cache holds \(3, 2, 16, 16\)"),
        (kv(dim=8), kv(dim=8), r"\(3, 2, 8, 8\)"),
        (kv(), kv(tokens=2), r"\(3, 2, 1, 16\) and \(3, 2, 2, 16\)"),
        (kv(dtype=torch.float16), kv(dtype=torch.float16), r"torch.float16.*torch.float32"),
        (kv(), kv(dtype=torch.bfloat16), r"keys are torch.float32 on cpu, values torch.bfloat16"),
        (kv()[0], kv()[0], r"\(2, 1, 16\)"),
    ],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_wrong_tensors(filled: PiKVCache, layer: int, keys: torch.Tensor, values: torch.Tensor, message: str) -> None:
    before = snapshot(filled)
    with pytest.raises(ValueError, match=f"layer {layer}: .*{message}"):
        filled.update(keys, values, layer)
    assert_unchanged(filled, before)


def test_wrong_tensors_on_a_sliding_layer() -> None:
    model = FAMILIES["gpt_oss"].build()
    cache = PiKVCache.for_model(model)
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
    length = cache.layers[0].get_seq_length()
    with pytest.raises(ValueError, match=r"layer 0: .*\(2, 2, 16, 16\), but the cache holds \(3, 2, 16, 16\)"):
        cache.update(kv(batch=2), kv(batch=2), 0)
    assert cache.layers[0].get_seq_length() == length


def test_wrong_batch_through_the_model(model: Any, filled: PiKVCache) -> None:
    before = snapshot(filled)
    with pytest.raises(ValueError, match="batch"), torch.no_grad():
        call(model, filled, batch=1)
    assert_unchanged(filled, before)


def test_another_model(filled: PiKVCache) -> None:
    before = snapshot(filled)
    other = FAMILIES["qwen3_moe"].build(seed=1)
    with attach(other), torch.no_grad(), pytest.raises(ValueError, match="made for another model"):
        call(other, filled, tokens=1)
    assert_unchanged(filled, before)
    with attach(other), torch.no_grad(), pytest.raises(ValueError, match="made for another model"):
        call(other, filled, tokens=4)
    assert_unchanged(filled, before)


def test_a_model_of_other_depth(filled: PiKVCache) -> None:
    with pytest.raises(ValueError, match="layer_idx is 3, but the cache was made for a model of 3 layers"):
        filled.update(kv(), kv(), 3)


def test_wrong_mask_width(model: Any, filled: PiKVCache) -> None:
    before = snapshot(filled)
    mask = torch.ones(3, 1, 2, 50, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask spans 50 positions, the cache 77"), torch.no_grad():
        model(input_ids=torch.full((3, 2), 5), attention_mask=mask, past_key_values=filled)
    assert_unchanged(filled, before)


def test_rows_out_of_range(filled: PiKVCache) -> None:
    before = snapshot(filled)
    with pytest.raises(IndexError, match="row 3 is out of range for a cache of 3 rows"):
        filled.reorder_cache(torch.tensor([0, 1, 3]))
    with pytest.raises(IndexError, match="out of"):
        filled.batch_select_indices(torch.tensor([0, 5]))
    assert_unchanged(filled, before)


def test_cropping_a_full_sliding_layer_changes_nothing() -> None:
    model = FAMILIES["gpt_oss"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(**prompts(), past_key_values=cache)
    with pytest.raises(ValueError, match='layer 0 only kept the last 23; sliding_layers="paged"'):
        cache.crop(40)
    assert [layer.get_seq_length() for layer in cache.layers] == [75, 75, 75]


@pytest.mark.parametrize("tokens", [1, 40])
def test_out_of_memory_changes_nothing(
    model: Any, filled: PiKVCache, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Growth fails at a layer: that layer is as before, and cropping brings the others back."""
    with torch.no_grad():
        while filled.layers[0].table.plain.allocator.free_pages:
            call(model, filled, tokens=1)
    layer = filled.layers[0]
    before, seen = [t.clone() for t in layer.dense()], layer.seen

    def no_memory(extra: int) -> None:
        raise torch.OutOfMemoryError("no memory for more pages")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layer.table.plain, "_grow", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            decode(model, filled, tokens, steps=30)
    filled.crop(seen)
    assert layer.seen == seen
    for then, now in zip(before, layer.dense(), strict=True):
        assert torch.equal(then, now)


without_states = pytest.mark.skipif(
    hasattr(transformers.Cache, "update_recurrent_state"), reason="this transformers keeps states beside K/V"
)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("T5Config", {}, "encoder-decoder"),
        pytest.param("Qwen3NextConfig", {}, "linear_attention", marks=without_states),
        pytest.param("JambaConfig", {}, "mamba", marks=without_states),
        pytest.param("MambaConfig", {}, "(recurrent state|layers of type)", marks=without_states),
        pytest.param("Lfm2MoeConfig", {"layer_types": ["conv", "full_attention"] * 16}, "conv", marks=without_states),
    ],
)
def test_unsupported_architectures(config: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{config}.*{message}"):
        PiKVCache(getattr(transformers, config)(**options))


@without_states
def test_unsupported_models_are_left_alone() -> None:
    small = {**COMMON, "num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2}
    config = transformers.Qwen3NextConfig(**small, moe_intermediate_size=32, head_dim=16)
    model = transformers.Qwen3NextForCausalLM(config)
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match="linear_attention"):
        attach(model)
    assert model.config._attn_implementation == implementation


def test_history_that_attention_never_read(model: Any, filled: PiKVCache) -> None:
    """An interrupted call, or a wrapper that copies the keys, is noticed at the next update."""
    before = snapshot(filled)
    filled.layers[0].update_from_attention(kv(), kv())
    with pytest.raises(RuntimeError, match=r"layer 0: no attention has read the history.*crop"):
        filled.layers[0].update_from_attention(kv(), kv())
    filled.crop(75)
    assert_unchanged(filled, before)
    with torch.no_grad():
        call(model, filled, tokens=1)


def test_router_of_another_batch(filled: PiKVCache) -> None:
    filled.layers[0].update_from_attention(kv(tokens=4), kv(tokens=4))
    with pytest.raises(RuntimeError, match="layer 0: the router chose experts for 5 tokens, the cache got 12"):
        filled.layers[0].record_experts(torch.zeros(5, dtype=torch.long))


def test_offloading_is_refused(filled: PiKVCache) -> None:
    with pytest.raises(NotImplementedError, match="offloading"):
        filled.layers[0].offload()


def test_for_model_takes_one_kind_of_options(model: Any) -> None:
    with pytest.raises(TypeError, match="both"):
        PiKVCache.for_model(model, PiKVConfig(), page_size=8)
    with pytest.raises(TypeError, match="did you mean 'page_size'"):
        PiKVCache.for_model(model, pagesize=8)
    with pytest.raises(TypeError, match="PiKVConfig, got dict"):
        PiKVCache(model.config, {"page_size": 8})


WITHOUT_EFFECT = [
    {"key_codec": "int4"},
    {"value_codec": "int8", "key_codec": "int8"},
    {"routing": "page_bound"},
    {"tiers": {"cpu": None}},
]


def sliding_model() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, sliding_window=8))


@pytest.mark.parametrize("options", WITHOUT_EFFECT, ids=str)
def test_options_without_effect_are_named_where_all_layers_slide(options: dict[str, Any]) -> None:
    sliding = sliding_model()
    with pytest.warns(UserWarning, match="windows of 8 tokens") as caught:
        cache = PiKVCache.for_model(sliding, placement="hash", **options)
    (warning,) = caught
    assert all(f"{name}={value!r}" in str(warning.message) for name, value in options.items())
    assert warning.filename == __file__
    with torch.no_grad():
        sliding(torch.full((1, 20), 5), past_key_values=cache)
    # What it says helps.
    assert PiKVCache.for_model(sliding, placement="hash", sliding_layers="paged", **options).layers
    assert PiKVCache.for_model(sliding, placement="hash", page_size=8).layers


def test_a_budget_that_nothing_would_keep_to_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget='25%' is for .* none of this model's \d+ is, windows of 8 tokens"):
        PiKVCache.for_model(sliding_model(), placement="hash", budget="25%")


def test_a_saved_cache_without_pages_is_loaded_whatever_its_codecs(tmp_path: Any) -> None:
    sliding = sliding_model()
    with pytest.warns(UserWarning, match="changes nothing"):
        cache = PiKVCache.for_model(sliding, placement="hash", key_codec="int4")
    with torch.no_grad():
        sliding(torch.full((1, 20), 5), past_key_values=cache)
    cache.save(tmp_path / "cache")
    assert PiKVCache.load(tmp_path / "cache", sliding).get_seq_length() == 20
