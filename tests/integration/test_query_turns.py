"""Queries are moved right on every architecture: what is recalled is what queries at later positions would recall."""

import gc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES
from recall_reference import expected_recall
from transformers import AttentionInterface, DynamicCache

from pikv_hf import PiKVCache, attach
from pikv_hf.allocation.observed_queries import Observer
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.presses import PiKVPress

TOKENS = 90

#: Normalises queries after it has rotated them, with weights of their own.
NOT_MOVED = {"hunyuan_v1_moe"}


def observed(model, caches):
    """Return what was observed at the first layer when its model has read parts of a prompt, each with its cache."""
    with attach(model, "hash") as attached, torch.no_grad():
        first = attached.attention_modules()[0]
        observer = Observer.of(first)
        observer.recalls = True
        parts = caches(model)
        for ids, cache in parts:
            model(ids, **cache_argument(cache))
        return SimpleNamespace(
            recalled=observer.recalled, scale=observer.scale, softcap=observer.softcap, observer=observer
        )


class FirstLayer(Exception):
    """Ends a forward once its first layer attends."""


def noted(model, ids, positions):
    """Return queries, keys, and what else the first layer's attention is given, with these positions."""
    found = []

    def note(module, query, key, value, mask, **given):
        found.append((query, key, given))
        raise FirstLayer

    AttentionInterface.register("noting", note)
    config = model.config.get_text_config(decoder=True)
    config._attn_implementation = "noting"
    with torch.no_grad(), pytest.raises(FirstLayer):
        model(ids, position_ids=positions[None], use_cache=False)
    return found[0]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_recall_is_that_of_queries_behind_the_prompt(name) -> None:
    model = FAMILIES[name].build(max_position_embeddings=4096)
    ids = torch.randint(3, 190, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    observer = observed(model, lambda model: [(ids, PiKVCache.for_model(model, placement="hash"))])
    if name in NOT_MOVED:
        assert observer.recalled is None
        return
    positions = torch.arange(TOKENS)
    query, keys, given = noted(model, ids, positions)
    moved = noted(model, ids, positions + TOKENS - 1)[0]
    heads, sinks = keys.shape[1], given.get("s_aux")
    groups = query.shape[1] // heads
    asked, later = (part[0].unflatten(0, (heads, groups)) for part in (query, moved))
    of_heads = [None] * heads if sinks is None else list(sinks.detach().unflatten(0, (heads, groups)))
    expected = torch.stack(
        [
            expected_recall(*pair, key, observer.scale, observer.softcap, sink)
            for *pair, key, sink in zip(asked, later, keys[0], of_heads, strict=True)
        ]
    )[None]
    # Angles of hundreds of radians, added up in float32.
    torch.testing.assert_close(observer.recalled, expected, rtol=1e-2, atol=1e-4)
    assert float(expected.std()) > 1e-3


def prompt(seed: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, 190, (1, tokens), generator=torch.Generator().manual_seed(seed))


def test_other_caches_hear_the_same() -> None:
    model, ids = FAMILIES["qwen3_moe"].build(), prompt(0)
    ours = observed(model, lambda model: [(ids, PiKVCache.for_model(model, placement="hash"))]).recalled
    theirs = observed(model, lambda model: [(ids, DynamicCache(config=model.config))]).recalled
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("make", [lambda m: PiKVCache.for_model(m, placement="hash"), lambda m: DynamicCache()])
def test_a_prompt_in_parts_is_recalled_part_by_part(make) -> None:
    model, ids = FAMILIES["qwen3_moe"].build(), prompt(1)

    def parts(model):
        cache = make(model)
        return [(ids[:, :40], cache), (ids[:, 40:], cache)]

    whole = observed(model, lambda model: [(ids[:, :40], make(model))]).recalled
    both = observed(model, parts).recalled
    assert both.shape[-1] == TOKENS
    torch.testing.assert_close(both[:, :, :40], whole)


def test_what_another_cache_has_read_is_not_recalled() -> None:
    model, ids = FAMILIES["qwen3_moe"].build(), prompt(2)

    def alternating(model):
        one, other = (PiKVCache.for_model(model, placement="hash") for _ in range(2))
        return [(ids[:, :40], one), (prompt(3, 40), other), (ids[:, 40:], one)]

    assert observed(model, alternating).recalled is None


def test_of_single_tokens_nothing_is_known() -> None:
    model, ids = FAMILIES["qwen3_moe"].build(), prompt(4)

    def parts(model):
        cache = PiKVCache.for_model(model, placement="hash")
        return [(ids[:, :40], cache), (ids[:, 40:41], cache), (ids[:, 41:], cache)]

    recalled = observed(model, parts).recalled
    assert recalled.shape[-1] == TOKENS
    assert recalled.isnan().nonzero()[:, 2].unique().tolist() == [40]


def test_what_is_known_goes_with_the_cache() -> None:
    model, kept = FAMILIES["qwen3_moe"].build(), []

    def read(model):
        kept.append(PiKVCache.for_model(model, placement="hash"))
        return [(prompt(5), kept[0])]

    observer = observed(model, read).observer
    assert observer.recalled is not None
    kept.clear()
    gc.collect()
    assert observer.recalled is None


def test_threads_that_find_out_at_once_disturb_nobody() -> None:
    """Each with a cache of its own, on a model whose modules nobody has tried yet."""
    model = FAMILIES["qwen3_moe"].build()
    alone = FAMILIES["qwen3_moe"].build()
    ids = prompt(6, 120)

    def read(model):
        cache = PiKVCache.for_model(
            model, placement="hash", budget=64, scheduler="joint", page_size=8, recent_window=16
        )
        with torch.no_grad():
            return model(ids, **cache_argument(cache)).logits

    expected = read(alone)
    with ThreadPoolExecutor(4) as pool:
        for logits in pool.map(lambda _: read(model), range(8)):
            torch.testing.assert_close(logits, expected)
    assert model.config._attn_implementation == "pikv"


def test_a_row_of_padding_alone_is_read_like_others() -> None:
    model = FAMILIES["qwen3_moe"].build()
    ids = torch.cat([prompt(7, 60), prompt(8, 60)])
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    cache = PiKVCache.for_model(model, placement="hash", page_size=4)
    with PiKVPress(budget="50%")(model), torch.no_grad():
        for part in (slice(0, 30), slice(30, 60)):
            seen = mask[:, : part.stop]
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, part]
            model(ids[:, part], attention_mask=seen, position_ids=positions, **cache_argument(cache))
    assert cache.get_seq_length() == 60
