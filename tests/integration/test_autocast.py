"""Under autocast a cache stores what attention rounds K/V to, and the model's logits are DynamicCache's."""

import copy
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERY_FAMILY, FAMILIES, QUICK, prompts
from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig, detach
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.presses import PiKVPress

SMALL = {"page_size": 8, "recent_window": 16, "num_shards": 3}


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


def run(model: Any, cache: Any, *dtypes: torch.dtype | None) -> torch.Tensor:
    """Return the logits of a prompt, a chunk and four steps, `(B, n, V)` float32; the i-th call under `dtypes[i]`."""
    given = prompts(2, 40)
    ids, mask = given["input_ids"], given["attention_mask"]
    ends = [25, 33, 34, 35, 36, 37]
    logits = []
    with torch.no_grad():
        for call, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            with autocast(dtypes[min(call, len(dtypes) - 1)]):
                output = model(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            # Of the prompt only what real tokens say.
            logits.append(output.logits[:, -1:] if call == 0 else output.logits)
    return torch.cat([each.float() for each in logits], dim=1)


def dynamic(name: str, model: Any, *dtypes: torch.dtype | None) -> torch.Tensor:
    detach(model)
    model.set_attn_implementation("eager" if name == "gpt_oss" else "sdpa")
    return run(model, DynamicCache(config=model.config), *dtypes)


def stored_dtypes(cache: PiKVCache) -> set[torch.dtype]:
    return {layer.store.dtype if isinstance(layer, PiKVLayer) else layer.keys.dtype for layer in cache.layers}


def errors(logits: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the largest error of each token, `(B * n,)`."""
    return (logits - exact).abs().amax(dim=-1).flatten()


def assert_as_accurate(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Compare errors in the median over tokens: rounding turns a router here and there, not at the same."""
    rounded = errors(theirs, exact) > 0
    assert rounded.sum() >= 4, "nothing is rounded"
    limit = 2 * errors(theirs, exact)[rounded].median()
    assert errors(ours, exact)[rounded].median() <= limit
    assert errors(ours, theirs)[rounded].median() <= limit
    assert (errors(ours, exact)[~rounded] <= 1e-4).all()


# DBRX itself fails under autocast.
CASES = [
    *[
        pytest.param(each.values[0], torch.bfloat16, marks=each.marks)
        for each in EVERY_FAMILY
        if each.values[0] != "dbrx"
    ],
    *[(name, torch.float16) for name in QUICK],
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_every_family(name: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].build()
    exact, theirs = dynamic(name, model, None), dynamic(name, model, dtype)
    plain = PiKVCache(model.config, PiKVConfig(**SMALL))
    # The same numbers to the last bit: attention rounds to what is stored here.
    assert (run(model, plain, dtype) - theirs).abs().max() <= (1e-4 if name == "gpt_oss" else 0)
    placement = "expert" if FAMILIES[name].routed else "hash"
    for layers in ("bounded", "paged") if FAMILIES[name].sliding else ("paged",):
        cache = PiKVCache.for_model(model, **SMALL, placement=placement, sliding_layers=layers)
        assert_as_accurate(run(model, cache, dtype), theirs, exact)
        assert stored_dtypes(cache) == {dtype}


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def gpt_oss() -> Any:
    return FAMILIES["gpt_oss"].build()


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "jetmoe"])
def test_filled_outside_and_used_within(name: str, attached: bool) -> None:
    """What is stored in float32 stays so, and new tokens are widened to it."""
    model, dtype = FAMILIES[name].build(), torch.bfloat16
    exact = dynamic(name, model, None)
    for dtypes in ([None, dtype], [None, None, None, dtype], [None, dtype, None]):
        theirs = dynamic(name, model, *dtypes)
        options = {**SMALL, "placement": "hash"}
        cache = PiKVCache.for_model(model, **options) if attached else PiKVCache(model.config, PiKVConfig(**options))
        assert_as_accurate(run(model, cache, *dtypes), theirs, exact)
        assert stored_dtypes(cache) == {torch.float32}


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("sliding", [True, False])
@pytest.mark.parametrize(
    ("filled", "given", "named"),
    [
        (torch.bfloat16, None, r"float32.*bfloat16"),
        (torch.float16, None, r"float32.*float16"),
        (torch.float16, torch.bfloat16, r"float32.*float16"),
    ],
)
def test_wider_tokens_than_are_stored_are_refused(
    llama: Any, gpt_oss: Any, sliding: bool, attached: bool, filled: Any, given: Any, named: str
) -> None:
    model = gpt_oss if sliding else llama
    ids = prompts(1, 40)["input_ids"]
    cache = PiKVCache.for_model(model, **SMALL, placement="hash") if attached else PiKVCache(model.config)
    with torch.no_grad():
        with autocast(filled):
            model(input_ids=ids, past_key_values=cache)
        with autocast(given), pytest.raises(ValueError, match=named):
            model(input_ids=ids[:, :3], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [40] * len(cache.layers)
        with autocast(filled):
            model(input_ids=ids[:, :3], past_key_values=cache)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("sliding", [True, False])
def test_cropped_to_nothing_takes_any_tokens(llama: Any, gpt_oss: Any, sliding: bool, attached: bool) -> None:
    model = gpt_oss if sliding else llama
    ids = prompts(3, 10)["input_ids"]
    cache = PiKVCache.for_model(model, **SMALL, placement="hash") if attached else PiKVCache(model.config)
    fresh = PiKVCache.for_model(model, **SMALL, placement="hash") if attached else PiKVCache(model.config)
    with torch.no_grad():
        with autocast(torch.bfloat16):
            model(input_ids=ids[:2], past_key_values=cache)
        cache.crop(-10)
        for given in (ids, ids[:, :1], ids[:, 1:2]):
            logits = [model(input_ids=given, past_key_values=each).logits for each in (cache, fresh)]
            assert torch.equal(*logits)
    assert stored_dtypes(cache) == {torch.float32}
    assert cache.get_seq_length() == 12


def test_beams_forks_and_copies(llama: Any) -> None:
    given, options = prompts(2, 40), {"num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    detach(llama)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = llama.generate(**given, past_key_values=DynamicCache(config=llama.config), **options)
        plain = PiKVCache(llama.config, PiKVConfig(**SMALL))
        assert torch.equal(llama.generate(**given, past_key_values=plain, **options), expected)
        cache = PiKVCache.for_model(llama, **SMALL, placement="hash")
        llama.generate(**given, past_key_values=cache, **options)
        logits = []
        for each in (cache.fork(), copy.deepcopy(cache), cache):
            token = torch.full((6, 1), 5)
            mask = torch.ones(6, each.get_seq_length() + 1)
            mask[:, :40] = given["attention_mask"].repeat_interleave(3, dim=0)
            logits.append(llama(input_ids=token, attention_mask=mask, past_key_values=each).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_half_of_the_bytes(llama: Any) -> None:
    ids = prompts(1, 200)["input_ids"]
    caches = {dtype: PiKVCache.for_model(llama, placement="hash", page_size=16) for dtype in (None, torch.bfloat16)}
    for dtype, cache in caches.items():
        with torch.no_grad(), autocast(dtype):
            llama(input_ids=ids, past_key_values=cache)
    assert caches[torch.bfloat16].nbytes < 0.6 * caches[None].nbytes


@pytest.mark.parametrize(
    "options",
    [
        {"key_codec": "int8", "value_codec": "int4"},
        {"key_codec": "lowrank", "value_codec": "lowrank", "rank": 4},
        {"budget": 48},
        {"routing": "page_bound", "max_pages": 2},
        {"tiers": {"cpu": 16384, "disk": None}},
    ],
    ids=str,
)
def test_what_a_layer_computes_for_itself_is_not_rounded(options: dict[str, Any]) -> None:
    """The same choices, codes and statistics as without autocast, of a model that is in its dtype."""
    model = FAMILIES["qwen3_moe"].build().to(torch.bfloat16)
    within, without = (PiKVCache.for_model(model, **SMALL, **options) for _ in range(2))
    # All that is in bfloat16 is computed alike; what of the model is in float32 autocast may round.
    logits = run(model, within, torch.bfloat16)
    exact = run(model, without, None)
    assert (logits - exact).abs().mean() <= 0.1 * exact.abs().mean()
    for one, other in zip(within.layers, without.layers, strict=True):
        assert torch.equal(one.stored_mask(), other.stored_mask())


def test_presses(tmp_path: Path) -> None:
    model, ids = FAMILIES["qwen3_moe"].build(), prompts(1, 80)["input_ids"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with PiKVPress(compression_ratio=0.5)(model):
            cache = PiKVCache.for_model(model, **SMALL)
            model(input_ids=ids, past_key_values=cache)
        for layer in cache.layers:
            # As presses do that compute keys anew: in float32 beside values in bfloat16.
            layer.keys, layer.values = layer.keys.float() * 2, layer.values
            assert layer.keys.dtype == torch.bfloat16
        cache.save(tmp_path / "cache")
        loaded = PiKVCache.load(tmp_path / "cache", model)
        logits = [model(input_ids=ids[:, :3], past_key_values=each).logits for each in (cache, loaded)]
    assert torch.equal(*logits)
    assert stored_dtypes(loaded) == {torch.bfloat16}


def test_accelerator() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, given = FAMILIES["mixtral"].build(), prompts(1, 40)
    options = {"max_new_tokens": 8, "do_sample": False}
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    expected = prepared.generate(**given, past_key_values=DynamicCache(config=model.config), **options)
    plain = PiKVCache(model.config, PiKVConfig(**SMALL))
    assert torch.equal(prepared.generate(**given, past_key_values=plain, **options), expected)
    cache = PiKVCache.for_model(prepared, **SMALL)
    assert prepared.generate(**given, past_key_values=cache, **options).shape == expected.shape
    assert stored_dtypes(cache) == {torch.bfloat16}
    # Gradients behind a prefix that was read without any.
    prepared(input_ids=given["input_ids"][:, :4], past_key_values=cache).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0
