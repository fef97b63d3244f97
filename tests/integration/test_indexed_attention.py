"""Sparse attention whose tokens an indexer of the model's own chooses: its keys are paged with the latents."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from pikv_hf import PiKVCache, detach
from pikv_hf.attention import indexed_attention
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.latent_decode import run_latent_decode
from pikv_hf.eval.studies.models.tiny_models import VOCAB, tiny_model
from pikv_hf.integration.attention_code import only_indexes, why_not_in_place
from pikv_hf.layer.indexed_layer import IndexedLayer
from pikv_hf.layer.own_layer import INDEXED_LAYER, indexer_keys_of

#: Tokens that each query reads.
TOP = 16
LATENT = ("deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "mistral_large4")
#: Chooses blocks of tokens, for each group of heads others, without a look at masks.
BLOCKS = "minimax_m3_vl_text"
NAMES = sorted({*LATENT, BLOCKS} & set(CLASSES))
SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 13},
    "lookup": {"prompt_lookup_num_tokens": 3},
}

pytestmark = pytest.mark.skipif(INDEXED_LAYER is None, reason="this transformers' caches hold no indexer keys")


@functools.cache
def model_of(name: str) -> Any:
    # Layers that have no indexer read what the layer before them has chosen.
    shared = {"indexer_types": ["full", "shared", "full"]} if name in ("glm_moe_dsa", "hy_v4") else {}
    return tiny_model(name, **({} if name == BLOCKS else {"index_topk": TOP}), **shared)


def new_cache(name: str, **options: Any) -> PiKVCache:
    return PiKVCache.for_model(model_of(name), **{**SMALL, **options})


def dynamic(name: str) -> Any:
    return DynamicCache(config=model_of(name).config)


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(name: str, cache: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a call, `(B, Q, V)`."""
    with torch.no_grad():
        logits: torch.Tensor = model_of(name)(tokens, attention_mask=mask, **cache_argument(cache)).logits
    return logits


def assert_same_tokens(ours: PiKVCache, theirs: Any) -> None:
    """Compare all that layers hold of tokens; what both have computed differs by rounding."""
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        pairs = [(mine.keys, other.keys), (mine.values, other.values)]
        pairs += [(mine.indexer_keys, indexer_keys_of(other))] if isinstance(mine, IndexedLayer) else []
        for left, right in pairs:
            torch.testing.assert_close(left, right, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_generates_as_with_dynamic_cache(name: str, strategy: str) -> None:
    model, options = model_of(name), {**GREEDY, **STRATEGIES[strategy]}
    rows = 1 if strategy == "lookup" else 3
    prompt = ids(rows, 45)
    mask = torch.ones_like(prompt)
    if rows > 1 and (name, strategy) != (BLOCKS, "chunks"):
        mask[rows // 2, :9] = 0
    detach(model)
    expected = model.generate(prompt, attention_mask=mask, **options, **cache_argument(dynamic(name)))
    cache = new_cache(name)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **options, **cache_argument(cache)), expected)
    assert not cache.stats().dense_layers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tiers": {"cpu": "1 MiB"}},
        {"placement": "balanced"},
        {"placement": "hash", "num_shards": 1},
        {"devices": ["cpu:0", "cpu:1"]},
    ],
)
def test_logits_with_lossless_options(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    cache, theirs = new_cache(name, **options), dynamic(name)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = 0
    for number, tokens in enumerate((ids(2, 60), ids(2, 5), *(ids(2, 1, seed) for seed in range(20)))):
        mask = mask if not number else torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)
        ours, expected = (read(name, each, tokens, mask)[:, -1] for each in (cache, theirs))
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    cache.save(tmp_path / "cache")
    places = {"devices": options["devices"]} if "devices" in options else {}
    loaded, twin = PiKVCache.load(tmp_path / "cache", model_of(name), **places), cache.fork()
    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    expected = read(name, theirs, ids(2, 1), mask)
    for each in (cache, loaded, twin):
        torch.testing.assert_close(read(name, each, ids(2, 1), mask), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "codecs",
    [
        {"key_codec": "int8"},
        {"key_codec": "int4", "value_codec": "int4"},
        {"key_codec": "fp8", "value_codec": "int2"},
        {"key_codec": "int8", "value_codec": "int8", "tiers": {"cpu": "1 MiB"}},
    ],
)
@pytest.mark.parametrize("name", ["deepseek_v32", BLOCKS])
def test_packed_tokens_are_read_as_what_they_are_decoded_to(name: str, codecs: dict[str, Any]) -> None:
    cache = new_cache(name, **codecs)
    read(name, cache, ids(2, 90))
    for step in range(10):
        theirs = dynamic(name)
        for index, layer in enumerate(cache.layers):
            layer.settle()
            theirs.update(layer.keys, layer.values, index)
            if name == BLOCKS and index:
                theirs.layers[index].update_index(layer.idx_keys)
            elif name != BLOCKS:
                theirs.update_indexer(layer.indexer_keys, index)
        token = ids(2, 1, step)
        torch.testing.assert_close(read(name, cache, token), read(name, theirs, token), atol=1e-3, rtol=0)
    assert len(cache.layers[0].table.pools.by_id()) > 1


# Of both heads four blocks of four tokens each.
@pytest.mark.parametrize(("name", "chosen"), [("deepseek_v32", TOP), (BLOCKS, 2 * 4 * 4)])
def test_a_step_reads_what_is_chosen(name: str, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    gather = indexed_attention.gather_tokens

    def note(codes: Any, numbers: torch.Tensor, *rest: Any) -> torch.Tensor:
        gathered.append(len(numbers))
        return gather(codes, numbers, *rest)

    cache = new_cache(name)
    read(name, cache, ids(1, 300))
    monkeypatch.setattr(indexed_attention, "gather_tokens", note)
    cache.layers[1].settle()
    in_full_pages = int(cache.layers[1].table.view.full_pages().counts.sum())
    assert in_full_pages > 200
    for _ in range(3):
        read(name, cache, ids(1, 1))
    # Of keys and values, in each layer and step.
    indexed = sum(isinstance(layer, IndexedLayer) for layer in cache.layers)
    assert gathered == [chosen] * (2 * 3 * indexed)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(1, 12)),
        st.tuples(st.just("reorder"), st.permutations([0, 1])),
        st.tuples(st.just("fork"), st.just(0)),
        st.tuples(st.just("copied"), st.just(0)),
        st.tuples(st.just("outside"), st.integers(1, 3)),
    ),
    min_size=2,
    max_size=8,
)


@settings(max_examples=25, deadline=None)
@given(operations=OPERATIONS, seed=st.integers(0, 99))
def test_programs(operations: list[tuple[str, Any]], seed: int) -> None:
    name = ("deepseek_v32", "glm_moe_dsa", BLOCKS)[seed % 3]
    ours, theirs = new_cache(name), dynamic(name)
    for cache in (ours, theirs):
        read(name, cache, ids(2, 30, seed))
    for number, (kind, what) in enumerate(operations):
        if kind == "crop":
            ours.crop(-what)
            theirs.crop(-what)
        elif kind == "reorder":
            for cache in (ours, theirs):
                cache.reorder_cache(torch.tensor(what))
        elif kind == "fork":
            kept, ours = ours, ours.fork()
            read(name, kept, ids(2, 3, number))
        elif kind == "copied":
            ours = PiKVCache.from_cache(model_of(name), theirs, **SMALL)
        else:
            if kind == "outside":
                detach(model_of(name))
            tokens = ids(2, what, seed + number)
            logits = [read(name, cache, tokens) for cache in (ours, theirs)]
            torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
            PiKVCache.for_model(model_of(name))
        assert_same_tokens(ours, theirs)


@pytest.mark.parametrize("name", ["deepseek_v32", BLOCKS])
def test_bytes_are_those_of_dynamic_cache(name: str) -> None:
    cache, theirs = new_cache(name, recent_window=0, sink_tokens=0), dynamic(name)
    for each in (cache, theirs):
        read(name, each, ids(1, 400))
    of_layers = [(layer.keys, layer.values, indexer_keys_of(layer)) for layer in theirs.layers]
    held = sum(x.nbytes for tensors in of_layers for x in tensors if x is not None)
    report = cache.memory_report()
    assert held <= report.keys + report.values < 1.25 * held


@pytest.mark.parametrize("name", ["deepseek_v32", BLOCKS])
def test_gradients_are_those_of_dynamic_cache(name: str) -> None:
    gradients: list[Any] = []
    model = model_of(name)
    for tokens in (1, 4):
        for cache in (new_cache(name), dynamic(name)):
            read(name, cache, ids(2, 60))
            embeddings = model.get_input_embeddings()(ids(2, tokens, 1)).detach().requires_grad_()
            model(inputs_embeds=embeddings, **cache_argument(cache)).logits.square().mean().backward()
            gradients.append(embeddings.grad)
            model.zero_grad()
        torch.testing.assert_close(*gradients[-2:], atol=1e-4 * float(gradients[-1].abs().max()), rtol=0)


def test_a_call_that_ends_between_latents_and_indexer_can_be_taken_back() -> None:
    name = "deepseek_v32"
    model, cache, theirs = model_of(name), new_cache(name), dynamic(name)
    for each in (cache, theirs):
        read(name, each, ids(2, 40))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.indexer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        read(name, cache, ids(2, 2))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"cache\.crop"):
        read(name, cache, ids(2, 2))
    cache.crop(40)
    torch.testing.assert_close(read(name, cache, ids(2, 1)), read(name, theirs, ids(2, 1)), atol=1e-3, rtol=0)
    assert_same_tokens(cache, theirs)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"routing": "page_bound"}, "routing='page_bound'"), ({"budget": "1 MiB"}, "budget='1 MiB'")],
)
def test_choosing_twice_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"indexer of the model's own chooses.*{said}"):
        new_cache("deepseek_v32", **options)


def wrong_dtype(cache: Any) -> None:
    cache.update(torch.zeros(2, 1, 1, 16), torch.zeros(2, 1, 1, 8), 0)
    cache.update_indexer(torch.zeros(2, 1, 24, dtype=torch.float64), 0)


def twice(cache: Any) -> None:
    cache.update_indexer(torch.zeros(2, 1, 24), 0)


def assigned(cache: Any) -> None:
    cache.layers[0].keys, cache.layers[0].values = cache.layers[0].keys[:, :, ::2], cache.layers[0].values[:, :, ::2]


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (wrong_dtype, r"float64.*float32"),
        (twice, "before the K/V of their tokens, or twice"),
        (assigned, "cannot be assigned"),
    ],
)
def test_what_does_not_fit_is_refused(refused: Callable[[Any], None], said: str) -> None:
    name = "deepseek_v32"
    cache, theirs = PiKVCache(model_of(name).config), dynamic(name)
    detach(model_of(name))
    for each in (cache, theirs):
        read(name, each, ids(2, 30))
    with pytest.raises((ValueError, RuntimeError), match=said):
        refused(cache)
    torch.testing.assert_close(read(name, cache, ids(2, 1)), read(name, theirs, ids(2, 1)), atol=0, rtol=0)
    assert_same_tokens(cache, theirs)


def test_a_cache_without_indexer_keys_is_no_source() -> None:
    name = "deepseek_v32"
    plain = DynamicCache()
    for index in range(3):
        plain.update(torch.zeros(1, 1, 5, 16), torch.zeros(1, 1, 5, 8), index)
    with pytest.raises(TypeError, match="needs the keys of an indexer"):
        PiKVCache.from_cache(model_of(name), plain)


def test_indices_that_are_no_positions_are_refused() -> None:
    name = "deepseek_v32"
    model = copy.deepcopy(model_of(name))
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(ids(2, 30), **cache_argument(cache))
    indexer = model.model.layers[0].self_attn.indexer
    indexer.register_forward_hook(lambda _, args, out: out.float())
    with pytest.raises(NotImplementedError, match=r"indices that are no integers \(2, 1, 'k'\)"), torch.no_grad():
        model(ids(2, 1), **cache_argument(cache))


def test_padding_that_comes_later_is_refused_where_it_is_compared() -> None:
    cache, theirs = new_cache(BLOCKS), dynamic(BLOCKS)
    for each in (cache, theirs):
        read(BLOCKS, each, ids(2, 30))
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, 30:32] = 0
    with pytest.raises(NotImplementedError, match="compares padding, too"):
        read(BLOCKS, cache, ids(2, 3), mask)
    cache.crop(30)
    torch.testing.assert_close(read(BLOCKS, cache, ids(2, 1)), read(BLOCKS, theirs, ids(2, 1)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deepseek_v32", BLOCKS])
def test_in_inference_mode(name: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(model_of(name)).to(dtype)
    cache, theirs = PiKVCache.for_model(model, **SMALL), DynamicCache(config=model.config)
    with torch.inference_mode():
        for tokens in (ids(2, 40), ids(2, 1), ids(2, 3), ids(2, 1, 2)):
            logits = [model(tokens, **cache_argument(each)).logits for each in (cache, theirs)]
            # Rounding to bfloat16 has another token chosen now and then.
            if dtype is torch.float32:
                torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
            assert not logits[0].isnan().any()
    assert cache.layers[1].indexer_keys.dtype is dtype


def test_the_benchmark_compares_equal_steps() -> None:
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "index_topk": 64}
    exact, packed = run_latent_decode([600], ("exact", "int8"), 0.0, indexed=True, **small)
    assert (exact.name, exact.to_none) == ("dsa exact", 1.0)
    assert exact.max_difference < 1e-5 < packed.max_difference
    assert exact.kv_bytes > packed.kv_bytes


class Indexer(torch.nn.Module):
    """Has the cache for its keys alone."""

    def forward(self, keys, cache=None):
        if cache is not None:
            keys = cache.update_indexer(keys, 0)
        return keys


class Reader(torch.nn.Module):
    """Looks at the cache's layers, too."""

    def forward(self, keys, cache=None):
        keys = cache.update_indexer(keys, 0)
        return keys + cache.layers[0].keys.sum()


class Passer(torch.nn.Module):
    """Hands the cache on."""

    def forward(self, keys, cache=None):
        keys = cache.update_indexer(keys, 0)
        return self.other(keys, cache)


class Masks(torch.nn.Module):
    """Makes a mask of all keys where its attention is another."""

    names = ("eager", "sdpa")

    def forward(self, query, cache, ALL_ATTENTION_FUNCTIONS):
        key, value = cache.update(query, query, 0)
        mask, indices = None, None
        if self.config._attn_implementation in ("eager", "sdpa"):
            mask = query.new_ones(key.shape[2])
        else:
            indices = self.chosen
        attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attention_interface(self, query, key, value, mask, indices=indices)
        return self.out(out)


class MasksWithPiKV(torch.nn.Module):
    """Makes it with PiKV's attention, too."""

    def forward(self, query, cache, ALL_ATTENTION_FUNCTIONS):
        key, value = cache.update(query, query, 0)
        mask = None
        if self.config._attn_implementation in ("eager", "sdpa", "pikv"):
            mask = query.new_ones(key.shape[2])
        attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out = attention_interface(self, query, key, value, mask)
        return self.out(out)


def test_what_indexers_and_their_attention_may_do() -> None:
    assert only_indexes(Indexer)
    assert not only_indexes(Reader)
    assert not only_indexes(Passer)
    assert not only_indexes(torch.nn.Linear)
    assert why_not_in_place(Masks()) is None
    assert "takes for those of all tokens" in str(why_not_in_place(MasksWithPiKV()))
