"""Sparse attention whose tokens an indexer of the model's own chooses: its keys are paged with the latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed_models import (
    BLOCKS,
    NAMES,
    SMALL,
    TOP,
    assert_same_tokens,
    dynamic,
    ids,
    model_of,
    needs_indexers,
    new_cache,
    read,
)
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach, detach
from pikv_hf.attention import indexed_attention
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.latent_decode import run_latent_decode
from pikv_hf.layer.indexed_layer import IndexedLayer
from pikv_hf.layer.own_layer import indexer_keys_of

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 13},
    "lookup": {"prompt_lookup_num_tokens": 3},
}

pytestmark = needs_indexers


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


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_dynamic_cache(name: str) -> None:
    gradients: list[Any] = []
    model = model_of(name)
    for before, tokens in ((0, 5), (60, 1), (60, 4)):
        for cache in (new_cache(name), dynamic(name)):
            if before:
                read(name, cache, ids(2, before))
            embeddings = model.get_input_embeddings()(ids(2, tokens, 1)).detach().requires_grad_()
            model(inputs_embeds=embeddings, **cache_argument(cache)).logits.square().mean().backward()
            gradients.append(embeddings.grad)
            model.zero_grad()
        torch.testing.assert_close(*gradients[-2:], atol=1e-4 * float(gradients[-1].abs().max()), rtol=0)


def four_dimensional(rows: int, queries: int, tokens: int, past: int) -> torch.Tensor:
    return torch.ones(rows, 1, queries, tokens, dtype=torch.bool).tril(past)


def blank(name: str, queries: int, tokens: int) -> dict[str, Any]:
    """An additive mask that hides everything from the first row."""
    mask = torch.zeros(2, 1, queries, tokens).masked_fill(
        ~four_dimensional(2, queries, tokens, tokens - queries), torch.finfo(torch.float32).min
    )
    mask[0] = torch.finfo(torch.float32).min
    return {"attention_mask": mask}


def biased(name: str, queries: int, tokens: int) -> dict[str, Any]:
    """An additive mask with biases, which MiniMax-M3 takes for hidden tokens."""
    mask = blank(name, queries, tokens)["attention_mask"]
    mask[0], bias = mask[1], torch.rand(2, 1, queries, tokens, generator=torch.Generator().manual_seed(1))
    return {"attention_mask": torch.where((mask == 0) & (bias > 0.5), bias, mask)}


def elsewhere(name: str, queries: int, tokens: int) -> dict[str, Any]:
    """Positions that are not the columns."""
    return {"position_ids": (torch.arange(tokens)[None, -queries:] - 7).clamp_min(0)}


@pytest.mark.parametrize("arguments", [blank, biased, elsewhere])
@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", BLOCKS])
@torch.no_grad()
def test_masks_and_positions_are_those_of_the_model(name: str, arguments: Callable[..., dict[str, Any]]) -> None:
    model = model_of(name)
    seen = []
    for make in (dynamic, dynamic, new_cache):
        # The model's own attention, PiKV's with another cache, and with its own.
        cache = make(name)
        detach(model)
        if seen:
            attach(model, "hash")
        past = 0
        outs = []
        for tokens in (ids(2, 45), ids(2, 1, 1), ids(2, 5, 2), ids(2, 1, 3)):
            past += tokens.shape[1]
            given = arguments(name, tokens.shape[1], past)
            outs.append(model(tokens, **given, **cache_argument(cache)).logits)
        seen.append(outs)
    for theirs, attached, ours in zip(*seen, strict=True):
        torch.testing.assert_close(attached, theirs, atol=1e-3, rtol=0)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("padding", [4, 24, 40, 46])
def test_padding_in_blocks(padding: int) -> None:
    """So much of it that later queries are shown none of the blocks that they choose."""
    model, prompt = model_of(BLOCKS), ids(2, 48)
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    detach(model)
    expected = model.generate(prompt, attention_mask=mask, **GREEDY, **cache_argument(dynamic(BLOCKS)))
    cache = new_cache(BLOCKS)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **GREEDY, **cache_argument(cache)), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoded_token_that_its_own_mask_hides_may_be_shown_later(name: str) -> None:
    cache, theirs = new_cache(name), dynamic(name)
    mask = torch.ones(2, 30, dtype=torch.long)
    for tokens, shown in ((ids(2, 30), 1), (ids(2, 1, 1), 0), (ids(2, 1, 2), 1), (ids(2, 4, 3), 1)):
        if tokens.shape[1] < 30:
            mask = torch.nn.functional.pad(mask, (0, tokens.shape[1]), value=1)
            mask[0, 30] = shown
        logits = [read(name, each, tokens, mask)[1] for each in (cache, theirs)]
        torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["deepseek_v32", BLOCKS])
def test_in_inference_mode(name: str) -> None:
    model = model_of(name)
    cache, theirs = PiKVCache.for_model(model, **SMALL), DynamicCache(config=model.config)
    with torch.inference_mode():
        for tokens in (ids(2, 40), ids(2, 1), ids(2, 3), ids(2, 1, 2)):
            logits = [model(tokens, **cache_argument(each)).logits for each in (cache, theirs)]
            torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


def test_the_benchmark_compares_equal_steps() -> None:
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "index_topk": 64}
    exact, packed = run_latent_decode([600], ("exact", "int8"), 0.0, indexed=True, **small)
    assert (exact.name, exact.to_none) == ("dsa exact", 1.0)
    assert exact.max_difference < 1e-5 < packed.max_difference
    assert exact.kv_bytes > packed.kv_bytes


@pytest.mark.parametrize("name", NAMES)
def test_tokens_from_outside_wait_for_no_router(name: str, tmp_path: Path) -> None:
    cache, theirs = new_cache(name), dynamic(name)
    detach(model_of(name))
    for tokens in (ids(2, 30), ids(2, 1), ids(2, 4)):
        torch.testing.assert_close(read(name, cache, tokens), read(name, theirs, tokens), atol=1e-3, rtol=0)
        cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model_of(name))
    torch.testing.assert_close(read(name, loaded, ids(2, 1)), read(name, theirs, ids(2, 1)), atol=1e-3, rtol=0)
