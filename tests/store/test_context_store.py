"""A store of contexts gives the tokens of a model without one, whatever was put and asked for before."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from context_prompts import FIRST, GREEDY, OPTIONS, OTHER, SECOND, ids, joined
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import ContextStore, PiKVCache, PiKVConfig
from pikv_hf.common.transformers_release import cache_argument


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build()


#: Prompts, and how many of their tokens are known when they come one after the other.
CHAT = [
    (joined(FIRST, SECOND), 0),
    (joined(FIRST, OTHER), 40),
    (joined(FIRST, SECOND), 69),
    (FIRST, 39),
    (joined(FIRST, SECOND[:, :1]), 40),
    (joined(FIRST, OTHER, SECOND), 70),
    (joined(FIRST, OTHER[:, :20], FIRST), 60),
    (joined(SECOND, FIRST), 0),
]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "llama"])
def test_tokens_are_those_without_a_store(family: str) -> None:
    model = FAMILIES[family].build()
    expected = [model.generate(prompt, **GREEDY) for prompt, _ in CHAT]
    placement = {"placement": "hash"} if family == "llama" else {}
    store = ContextStore(model, **OPTIONS, **placement)
    reused = 0
    for (prompt, known), tokens in zip(CHAT, expected, strict=True):
        assert torch.equal(store.generate(prompt, **GREEDY), tokens)
        found = store.stats().tokens_reused - reused
        # What was generated may by chance begin like a prompt.
        assert known <= found <= known + 1
        reused += found
    assert store.stats().hits == 6
    assert store.stats().misses == 2


def check_tokens(model: Any, store: ContextStore, prompt: torch.Tensor, dense: dict[int, DynamicCache]) -> None:
    """Compare what a store holds of a prompt with a dense cache that has read it."""
    cache, known = store.get(prompt)
    assert known == cache.get_seq_length()
    number = hash(tuple(prompt[0].tolist()))
    if number not in dense:
        dense[number] = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt, **cache_argument(dense[number]))
    for ours, theirs in zip(cache.layers, dense[number].layers, strict=True):
        for name in ("keys", "values") if known else ():
            assert (getattr(ours, name) - getattr(theirs, name)[:, :, :known]).abs().max() <= 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_random_programs(model: Any, seed: int, tmp_path: Path) -> None:
    """Prompts of few different pieces, put by hand or generated from, evicted, forgotten, and a store begun anew."""
    draw = torch.Generator().manual_seed(seed)
    pieces = [ids(length, number) for number, length in enumerate((3, 9, 17, 24))]
    budget, least = (None, 150_000)[seed % 2], (1, 8)[seed // 2 % 2]
    files: dict[str, Any] = {"path": tmp_path, "disk": 300_000} if seed // 4 % 2 else {}
    store = ContextStore(model, budget, least=least, **files, **OPTIONS)
    dense: dict[int, DynamicCache] = {}
    evictions = loaded = 0
    for _ in range(16):
        count = int(torch.randint(1, 5, (1,), generator=draw))
        chosen = torch.randint(len(pieces), (count,), generator=draw).tolist()
        prompt = joined(*(pieces[number] for number in chosen))
        what = int(torch.randint(8, (1,), generator=draw))
        if what < 5:
            assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        elif what == 5:
            cache, known = store.get(prompt, most=prompt.shape[1] - 1)
            with torch.no_grad():
                model(prompt[:, known:], **cache_argument(cache))
            store.put(prompt, cache)
        elif what == 6:
            store.forget(prompt)
        else:
            evictions, loaded = evictions + store.stats().evictions, loaded + store.stats().tokens_loaded
            store = ContextStore(model, budget, least=least, **files, **OPTIONS)
        check_tokens(model, store, prompt, dense)
        assert budget is None or store.nbytes <= budget
        assert sum(file.stat().st_size for file in tmp_path.glob("*/ctx-*")) <= 300_000
    stats = store.stats()
    assert budget is None or evictions + stats.evictions
    assert not files or loaded + stats.tokens_loaded
    assert store.stats().file_bytes == sum(file.stat().st_size for file in tmp_path.glob("*/ctx-*"))
    store.forget()
    assert (store.nbytes, len(store), store.stats().file_bytes) == (0, 0, 0)
    assert not list(tmp_path.glob("*/ctx-*"))


def test_shared_pages_are_there_once(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    long = ids(400, 5)
    store.generate(long, **GREEDY)
    alone = store.nbytes
    for seed in range(8):
        store.generate(joined(long, ids(9, seed)), **GREEDY)
    assert len(store) == 10
    single = PiKVCache.for_model(model, **OPTIONS)
    with torch.no_grad():
        model(long, **cache_argument(single))
    # Each has a window of its own, the page that it was copied from, and what it does not share.
    window = 5 * single.layers[0].table.plain.full_page_bytes * len(single.layers)
    assert store.nbytes <= alone + 9 * 2 * window
    assert store.nbytes < 3 * alone


def test_what_is_reported_is_what_entries_hold(model: Any) -> None:
    """With no cache in use the bytes are those of the pools, measured."""
    store = ContextStore(model, **OPTIONS)
    for seed in range(5):
        store.generate(joined(FIRST, ids(20, seed)), **GREEDY)
    entries = [node.value for tree in store._memory._trees.values() for node in tree.nodes()]
    pools = {
        id(table.pools): table.pools for entry in entries for layer in entry.cache.layers for table in [layer.table]
    }
    tables = sum(layer.table.host_bytes for entry in entries for layer in entry.cache.layers)
    held = tables + sum(
        pool.full_page_bytes * len(pool.count) for pages in pools.values() for pool in pages.by_id().values()
    )
    assert store.nbytes == held


def test_forks_in_use_keep_their_pages(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    prompt = joined(FIRST, SECOND)
    expected = model.generate(prompt, **GREEDY)
    store.generate(prompt, **GREEDY)
    cache, known = store.get(prompt, most=69)
    store.forget()
    assert known == 69
    assert torch.equal(model.generate(prompt, **GREEDY, **cache_argument(cache)), expected)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral_sliding"])
def test_layers_that_cannot_be_cropped_are_reused_at_checkpoints(family: str) -> None:
    model = FAMILIES[family].build()
    store = ContextStore(model, checkpoint_every=16, **OPTIONS)
    prompts = [joined(FIRST, SECOND), joined(FIRST, OTHER), joined(FIRST, SECOND, OTHER), joined(FIRST[:, :39], OTHER)]
    reused = []
    for prompt in prompts:
        before = store.stats().tokens_reused
        assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        reused.append(store.stats().tokens_reused - before)
    # 40 tokens are known, and the state behind 32 of them; of the third prompt all of the first, but for its answer.
    assert reused == [0, 32, 69, 32]
    assert store.stats().tokens_unreachable == 8 + 1 + 7


def test_threads(model: Any) -> None:
    """Sixteen threads ask one store at once, under a budget that has it evict all the time."""
    store = ContextStore(model, 400_000, **OPTIONS)
    prompts = [joined(FIRST, ids(5 + number, number)) for number in range(8)] + [ids(30, 90), joined(SECOND, FIRST)]
    expected = [model.generate(prompt, **GREEDY) for prompt in prompts]

    def ask(number: int) -> list[bool]:
        order = [(number + step * 3) % len(prompts) for step in range(4)]
        return [torch.equal(store.generate(prompts[each], **GREEDY), expected[each]) for each in order]

    with ThreadPoolExecutor(16) as threads:
        assert all(all(answers) for answers in threads.map(ask, range(16)))
    stats = store.stats()
    assert stats.hits + stats.misses == 64
    assert store.nbytes <= 400_000


def test_a_prefix_that_is_put_later_is_counted_once(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    store.generate(ids(400, 5), **GREEDY)
    before = store.nbytes
    cache, known = store.get(ids(400, 5)[:, :200])
    store.put(ids(400, 5), cache)
    assert known == 200
    page = cache.layers[0].table.plain.full_page_bytes * len(cache.layers)
    assert store.nbytes <= before + 12 * page


def test_changed_weights_and_edited_prompts_find_nothing_of_before() -> None:
    model = FAMILIES["llama"].build()
    store = ContextStore(model, **OPTIONS, placement="hash")
    store.generate(FIRST, **GREEDY)
    cache, _ = store.get(FIRST)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert torch.equal(store.generate(FIRST, **GREEDY), model.generate(FIRST, **GREEDY))
    assert store.stats().misses == 2
    for stale in (cache, cache.fork()):
        with pytest.raises(ValueError, match="before the model's weights"):
            store.put(FIRST, stale)
    changed = FIRST.clone()
    changed[0, 20] += 1
    before = store.stats().tokens_reused
    assert torch.equal(store.generate(changed, **GREEDY), model.generate(changed, **GREEDY))
    assert store.stats().tokens_reused == before + 20
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.down_proj.weight * 2)
    assert torch.equal(store.generate(changed, **GREEDY), model.generate(changed, **GREEDY))
    assert store.stats().tokens_reused == before + 20


def test_by_hand(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    cache, known = store.get(FIRST)
    assert known == 0
    with torch.no_grad():
        model(FIRST, **cache_argument(cache))
    assert store.put(FIRST, cache)
    again, known = store.get(joined(FIRST, SECOND))
    assert known == 40
    with torch.no_grad():
        ours = model(SECOND, **cache_argument(again)).logits
        theirs = model(joined(FIRST, SECOND)).logits[:, 40:]
    assert (ours - theirs).abs().max() <= 1e-4
    # What the caller does with its cache is not seen by others.
    assert store.get(joined(FIRST, SECOND))[1] == 40


def test_what_does_not_fit_is_refused(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    cache, _ = store.get(FIRST)
    with torch.no_grad():
        model(FIRST, **cache_argument(cache))
    with pytest.raises(ValueError, match="has read 40 tokens, and 7 are given"):
        store.put(FIRST[:, :7], cache)
    with pytest.raises(ValueError, match="other options"):
        store.put(FIRST, PiKVCache.for_model(model, page_size=16))
    with pytest.raises(ValueError, match="another model"):
        store.put(FIRST, PiKVCache.for_model(FAMILIES["qwen3_moe"].build(), **OPTIONS))
    with pytest.raises(TypeError, match="float32"):
        store.get(FIRST.float())
    with pytest.raises(ValueError, match=r"\(2, 40\)"):
        store.get(FIRST.repeat(2, 1))
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="2 rows"):
        store.put(FIRST, cache)
    with pytest.raises(TypeError, match="a cache of its own"):
        store.generate(FIRST, past_key_values=cache)
    with pytest.raises(ValueError, match="a budget of"):
        ContextStore(model, pikv_config=PiKVConfig(budget=0.5))
    spread = PiKVCache.for_model(model, devices=["cpu:0", "cpu:1"], **OPTIONS)
    with pytest.raises(ValueError, match="parts"):
        store.put(FIRST, spread)
    with pytest.raises(TypeError, match="page_sise"):
        ContextStore(model, page_sise=3)
    with pytest.raises(ValueError, match="budget"):
        ContextStore(model, "8 apples")
    assert len(store) == 0


def test_an_entry_above_the_budget_is_not_kept(model: Any) -> None:
    store = ContextStore(model, 1000, **OPTIONS)
    assert torch.equal(store.generate(FIRST, **GREEDY), model.generate(FIRST, **GREEDY))
    assert len(store) == 0
    assert store.nbytes == 0
    cache, _ = store.get(FIRST)
    with torch.no_grad():
        model(FIRST, **cache_argument(cache))
    assert not store.put(FIRST, cache)
