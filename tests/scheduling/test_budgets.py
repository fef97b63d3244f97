"""Budgets of a cache: they hold after every update, cost nothing while they are not reached, and say when they cannot
be kept."""

import copy
import dataclasses
import functools
import gc
from typing import Any

import numpy as np
import pytest
import scheduling_reference as slow
import torch
from families import FAMILIES
from press_runs import ids_of, padded, read
from test_budget_machine import shard_holdings
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from pikv_hf import PiKVCache, attach
from pikv_hf.config import SCHEDULERS
from pikv_hf.integration.attention_function import attend
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.scheduling.growth_limit import BudgetError
from pikv_hf.scheduling.page_scheduler import PageScheduler
from pikv_hf.scheduling.policies.registry import PageStats, SchedulingPolicy

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 4, "num_shards": 3}
#: Sinks, window and two pages of SMALL.
LEAST = 8 + 16 + 16


@functools.cache
def shared_model(family: str = "qwen3_moe") -> Any:
    """Return a model of two layers that tests leave as it is."""
    sliding = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    return FAMILIES[family].build(num_hidden_layers=2, **sliding)


def make_cache(model: Any, **options: Any) -> PiKVCache:
    return PiKVCache.for_model(model, **{**SMALL, **options})


def paged_layers(cache: PiKVCache) -> list[PiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]


def held(layer: PiKVLayer) -> float:
    """Return the most tokens that a sequence holds, mean over KV heads."""
    return float(layer.held().sum(2).float().mean(1).max())


@torch.no_grad()
def decode(model: Any, cache: PiKVCache, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """Read tokens one by one; returns the logits `(B, n, V)`."""
    return torch.cat([model(part, past_key_values=cache, **more).logits for part in ids.split(1, dim=1)], dim=1)


def check(cache: PiKVCache, forks: int = 1) -> None:
    """Every limit of the cache holds, on what is measured."""
    options, layers = cache.pikv_config, paged_layers(cache)
    budget, scope = options.budget, options.budget_scope
    if isinstance(budget, str):
        amount = int(float(budget.removesuffix("KB")) * 1000)
        if scope == "shard":
            for layer in layers:
                table = layer.table
                page = table.pool.full_page_bytes * len(table.rows)
                assert shard_holdings(layer).max() <= amount // page * table.pool.page_size
        elif scope == "layer":
            report = cache.memory_report()
            assert all(r.total <= amount * forks for r in report.layers if r.kind == "paged")
        else:
            assert cache.nbytes <= amount * forks
        return
    cache.memory_report()
    for layer in layers:
        most = budget if isinstance(budget, int) else int(budget * layer.seen)
        if scope == "shard":
            most = most if isinstance(budget, int) else most // layer.table.num_shards
            assert shard_holdings(layer).max() <= most
        elif scope == "cache" and isinstance(budget, int):
            assert held(layer) <= budget / len(layers)
        else:
            assert held(layer) <= (most if isinstance(budget, int) else max(most, LEAST))


@torch.no_grad()
def run(model: Any, cache: PiKVCache, ids: torch.Tensor, prompt: int, chunk: int, **more: Any) -> None:
    """Read a prompt in chunks, then the rest one by one; the budget is looked at after each."""
    for part in (*ids[:, :prompt].split(chunk, dim=1), *ids[:, prompt:].split(1, dim=1)):
        model(part, past_key_values=cache, logits_to_keep=1, **more)
        check(cache)


BUDGETS: list[tuple[Any, str | None]] = [
    (56, None),
    (LEAST, "layer"),
    (2 * 48, "cache"),
    (0.3, None),
    ("160KB", "cache"),
    ("80KB", "layer"),
    (12, "shard"),
    (0.4, "shard"),
    ("20KB", "shard"),
]
CODECS = ("none", "int4", "auto", "fp8", "lowrank")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("budget", "scope"), BUDGETS)
def test_a_budget_holds_after_every_update(budget: Any, scope: str | None, scheduler: str) -> None:
    """Every scheduler with every kind of budget, each with another codec, in one call or in chunks, batched."""
    model = shared_model()
    number = BUDGETS.index((budget, scope)) + SCHEDULERS.index(scheduler)
    prompt = 400 if isinstance(budget, str) and scope != "shard" else 90
    codec, chunk = CODECS[number % len(CODECS)], (prompt // 4, prompt)[number % 2]
    options = {"key_codec": codec, "value_codec": codec, "rank": 4}
    cache = make_cache(model, budget=budget, budget_scope=scope, scheduler=scheduler, **options)
    run(model, cache, ids_of(prompt + 9, batch=2), prompt, chunk)
    assert all(layer.schedule.tokens_evicted > 0 for layer in paged_layers(cache))
    assert cache.get_seq_length() == prompt + 9


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("budget", "scope"), [(64, None), (0.35, None), ("140KB", None), (12, "shard")])
def test_a_budget_holds_with_every_codec(budget: Any, scope: str | None, codec: str) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget, budget_scope=scope, key_codec=codec, value_codec=codec, rank=4)
    run(model, cache, ids_of(270, batch=2), 255, 255)
    assert all(layer.schedule.tokens_evicted > 0 for layer in paged_layers(cache))


@pytest.mark.parametrize(("budget", "codec"), [(LEAST, "none"), ("76KB", "none"), ("82KB", "int4"), (0.4, "int4")])
def test_bounded_sliding_layers_count(budget: Any, codec: str) -> None:
    model = shared_model("gpt_oss")
    cache = make_cache(model, budget=budget, key_codec=codec, value_codec=codec)
    assert any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    run(model, cache, ids_of(135, batch=2), 110, 55)
    assert all(layer.schedule.tokens_evicted > 0 for layer in paged_layers(cache))


@pytest.mark.parametrize(("budget", "scheduler"), [(56, "h2o"), ("90KB", "quest"), (0.4, "ada_kv")])
def test_a_budget_holds_with_routing(budget: Any, scheduler: str) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget, scheduler=scheduler, routing="page_bound", max_pages=2, key_codec="int4")
    run(model, cache, ids_of(115), 90, 45)
    assert all(layer.schedule.tokens_evicted > 0 for layer in paged_layers(cache))


@pytest.mark.parametrize("budget", [56, 0.3, "220KB"])
def test_a_budget_holds_in_padded_batches(budget: Any) -> None:
    model = shared_model()
    _, ids, mask = padded([90, 41])
    cache = make_cache(model, budget=budget, placement="hash")
    read(model, cache, ids, mask=mask)
    check(cache)
    for step in range(30):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        with torch.no_grad():
            model(ids[:, step : step + 1], past_key_values=cache, attention_mask=mask)
        check(cache)
    assert cache.layers[0].padding() == [0, 49]


@pytest.mark.parametrize("budget", [56, 0.3, "270KB"])
@pytest.mark.parametrize("beams", [3])
def test_a_budget_holds_in_beam_search(budget: Any, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget)
    seen, reorder = [], cache.reorder_cache

    def watched(order: torch.Tensor) -> None:
        check(cache)
        reorder(order)
        check(cache)
        seen.append(order)

    monkeypatch.setattr(cache, "reorder_cache", watched)
    out = model.generate(ids_of(80), past_key_values=cache, num_beams=beams, max_new_tokens=30, do_sample=False)
    assert out.shape == (1, 110)
    assert len(seen) > 20


@pytest.mark.parametrize("budget", [56, "75KB"])
def test_forks_keep_to_their_budgets(budget: Any) -> None:
    """Each brings one of its own. Once it is gone, the others are within theirs after their next page."""
    model = shared_model()
    cache = make_cache(model, budget=budget)
    ids = ids_of(150)
    run(model, cache, ids[:, :100], 80, 80)
    forks = [cache.fork() for _ in range(2)]
    for number, fork in enumerate(forks):
        logits = decode(model, fork, ids[:, 100 + number : 130])
        assert torch.isfinite(logits).all()
        check(fork, forks=3)
    before = cache.layers[0].held()
    del fork, forks
    gc.collect()
    assert torch.equal(cache.layers[0].held(), before)
    decode(model, cache, ids[:, 100:109])
    check(cache)


def test_a_fork_evicts_nothing_that_makes_no_room() -> None:
    """Pages that another cache holds are not given up for bytes that they would not free."""
    model = shared_model()
    cache = make_cache(model, budget="75KB")
    run(model, cache, ids_of(100), 80, 80)
    fork = cache.fork()
    before = fork.layers[0].held()
    decode(model, fork, ids_of(10, seed=3))
    assert torch.equal(fork.layers[0].held()[:, :, :100], before)


@pytest.mark.parametrize("budget", [4096, "100MB"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_budget_that_is_not_reached_changes_nothing(budget: Any, family: str) -> None:
    model = shared_model(family)
    _, ids, mask = padded([70, 33])
    options = {"attention_mask": mask, "max_new_tokens": 25, "do_sample": False}
    cache = make_cache(model, budget=budget)
    ours = model.generate(ids, past_key_values=cache, **options)
    theirs = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    assert torch.equal(ours, theirs)
    assert all(layer.schedule.pages_evicted == 0 for layer in paged_layers(cache))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_attention_is_that_over_what_is_held(scheduler: str) -> None:
    """An evicted token never takes part again; sinks and the recent window never go."""
    model = shared_model()
    cache = make_cache(model, budget=56, scheduler=scheduler)
    gone = [torch.zeros(2, 2, 0, dtype=torch.bool)] * 2
    for part in (*ids_of(90, batch=2).split(30, dim=1), *ids_of(40, batch=2, seed=2).split(1, dim=1)):
        with torch.no_grad():
            model(part, past_key_values=cache)
        cache.memory_report()
        for index, layer in enumerate(cache.layers):
            there = layer.held()
            assert not bool((there[:, :, : gone[index].shape[2]] & gone[index]).any())
            gone[index] = ~there
            assert bool(there[:, :, :4].all())
            assert bool(there[:, :, -16:].all())
    for layer in cache.layers:
        query = torch.randn(2, 4, 1, 16)
        keys, values = (part.repeat_interleave(2, dim=1) for part in layer.dense())
        hidden = ~layer.held().repeat_interleave(2, dim=1)[:, :, None]
        assert float(hidden.float().mean()) > 0.3
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=~hidden)
        torch.testing.assert_close(attend(layer, query)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scheduler", ["ada_kv", "duo"])
def test_heads_keep_different_tokens(scheduler: str) -> None:
    model = shared_model()
    cache = make_cache(model, budget=64, scheduler=scheduler)
    run(model, cache, ids_of(160), 90, 30)
    assert any(not torch.equal(layer.held()[:, 0], layer.held()[:, 1]) for layer in cache.layers)


@pytest.mark.parametrize("capacity", [16, 20, 33])
def test_lru_without_uses_is_a_circular_buffer_per_shard(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PiKV's shards of capacity S: the newest S tokens of each, as whole pages."""
    monkeypatch.setattr("pikv_hf.pages.usage_counters.UsageCounters.use", lambda self, index, hit: None)
    model = shared_model()
    cache = make_cache(model, budget=capacity, budget_scope="shard", scheduler="lru")
    layer, ids = cache.layers[0], ids_of(190)
    came: list[list[int]] = [[] for _ in range(3)]
    for part in (*ids[:, :60].split(30, dim=1), *ids[:, 60:].split(1, dim=1)):
        experts = shards_of_the_window(layer)
        with torch.no_grad():
            model(part, past_key_values=cache)
        cache.memory_report()
        for shard, there in enumerate(by_shard(layer)):
            came[shard] = sorted({*came[shard], *there, *(at for at, to in experts.items() if to == shard)})
            window = set(shards_of_the_window(layer))
            every = [at for at in came[shard] if at not in window]
            assert len(there) <= capacity
            assert there == every[len(every) - len(there) :], shard
            # Nothing goes that need not: with the page that went last there were too many.
            assert len(there) == len(every) or len(there) + 8 > capacity
    assert layer.schedule.tokens_evicted > 60


def shards_of_the_window(layer: PiKVLayer) -> dict[int, int]:
    """Return where the tokens of the recent window will go, by position."""
    if layer.table is None:
        return {}
    writer, (row,) = layer.table.writer, layer.table.rows
    pool, found = layer.table.pool, {}
    for page in row.window[writer.sink_pages :]:
        positions = pool.positions[page, : pool.count[page]].tolist()
        found |= dict(zip(positions, writer.page_shards(page).tolist(), strict=True))
    return found


def by_shard(layer: PiKVLayer) -> list[list[int]]:
    """Return the positions of the tokens in each shard of a layer of one sequence, sorted."""
    found: list[list[int]] = [[] for _ in range(layer.table.num_shards)]
    (row,) = layer.table.rows
    for name, pool in layer.table.pages.pools().items():
        for page in row.pages(name):
            if pool.shard[page] >= 0:
                found[pool.shard[page]] += [at for at in pool.positions[page].tolist() if at >= 0]
    return [sorted(positions) for positions in found]


class Watch(SchedulingPolicy):
    """Notes what a policy is shown, and what it says."""

    name = "watch"

    def __init__(self, policy: SchedulingPolicy) -> None:
        self.policy = policy
        self.asked: list[tuple[PageStats, np.ndarray]] = []

    def priority(self, view: PageStats) -> np.ndarray:
        self.asked.append((view, self.policy.priority(view)))
        return self.asked[-1][1]


@dataclasses.dataclass
class Noted(slow.Page):
    """A page, in the window until `in_shard`; what it was used for there says nothing later."""

    in_shard: bool = False

    def enter(self, step: int) -> None:
        """Being filled counts as a use."""
        self.in_shard, self.uses = True, [step]


@pytest.mark.parametrize("scheduler", ["h2o", "lru", "streaming_llm"])
def test_decisions_are_those_of_slow_statistics(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares and uses noted step by step, as attention reports them, lead to the same order of leaving."""
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=1)
    cache = make_cache(model, budget=64, scheduler=scheduler, num_shards=1, sink_tokens=0, recent_window=8)
    layer, before = cache.layers[0], {}
    watch = Watch(layer.schedule.policy)
    layer.schedule.policy = watch
    begin_step = PageScheduler.begin_step

    def begin(schedule: PageScheduler, table: Any) -> None:
        begin_step(schedule, table)
        before["usage"] = table.pool.usage.shares[0].clone(), table.pool.usage.steps[3].clone()

    monkeypatch.setattr(PageScheduler, "begin_step", begin)
    pages: dict[int, Noted] = {}
    for token in ids_of(200).split(1, dim=1):
        asked = len(watch.asked)
        with torch.no_grad():
            model(token, past_key_values=cache)
        for view, said in watch.asked[asked:]:
            shown = [pages[int(newest)] for newest in view.newest]
            assert [page.tokens for page in shown] == view.tokens.tolist()
            for page in shown:
                if not page.in_shard:
                    page.enter(view.step)
            expected = getattr(slow, scheduler)(sorted(shown, key=lambda page: page.newest), view.step)
            assert view.newest[np.lexsort((view.newest, said))].tolist() == [page.newest for page in expected]
        note(layer, pages, *before["usage"])
    assert len(watch.asked) > 10
    assert len(watch.asked[-1][0]) > 4


def note(layer: PiKVLayer, pages: dict[int, Noted], shares: torch.Tensor, uses: torch.Tensor) -> None:
    """Note what the step gave to each page, by the newest position that it will have; pages move as a whole here."""
    usage, (row,), now = layer.table.pool.usage, layer.table.rows, layer.schedule.now
    for page in row.pages().tolist():
        first = int(layer.table.pool.positions[page, 0])
        if first + 7 not in pages:
            pages[first + 7] = Noted(first, now - 1, first + 7, 8, 0)
        noted = pages[first + 7]
        if layer.table.pool.shard[page] >= 0 and not noted.in_shard:
            noted.enter(now - 1)
        if page < len(shares):
            noted.shares.append((now, float(usage.shares[0, page] - shares[page])))
            if usage.steps[3, page] > uses[page]:
                noted.uses.append(now)
        else:
            noted.shares.append((now, float(usage.shares[0, page])))


# What a budget cannot do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": LEAST - 1}, f"{LEAST - 1} tokens per layer.*at least {LEAST} are needed"),
        ({"budget": 2 * LEAST - 1, "budget_scope": "cache"}, f"over 2 layers leaves {LEAST - 1} .*at least {LEAST}"),
        ({"budget": 7, "budget_scope": "shard"}, "7 tokens per shard leaves 7 tokens, but at least 8"),
    ],
)
def test_too_few_tokens_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_cache(shared_model(), **options)


def test_too_few_bytes_are_refused_before_anything_is_stored() -> None:
    model = shared_model()
    cache = make_cache(model, budget="40KB")
    with torch.no_grad(), pytest.raises(BudgetError, match=r"20000 bytes per layer leaves 20000 .*may take \d+"):
        model(ids_of(60), past_key_values=cache)
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


def test_too_many_rows_are_refused_and_nothing_changes() -> None:
    model = shared_model()
    cache = make_cache(model, budget="75KB")
    read(model, cache, ids_of(90))
    before = [(layer.held(), *layer.dense()) for layer in cache.layers]
    with pytest.raises(BudgetError, match=r"37500 bytes per layer.*of 8 rows may take \d+"):
        cache.batch_repeat_interleave(8)
    for layer, then in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then, (layer.held(), *layer.dense()), strict=True))
    assert decode(model, cache, ids_of(1)).shape[0] == 1


def test_a_failed_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that does not fit, and a policy that fails."""
    model = shared_model()
    cache = make_cache(model, budget=56)
    run(model, cache, ids_of(100), 80, 40)
    before = [(layer.seen, layer.held(), *layer.dense()) for layer in cache.layers]

    def unchanged() -> bool:
        now = [(layer.seen, layer.held(), *layer.dense()) for layer in cache.layers]
        return all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b
            for then, after in zip(before, now, strict=True)
            for a, b in zip(then, after, strict=True)
        )

    with pytest.raises(ValueError, match="but the cache holds"):
        cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    assert unchanged()
    reached = copy.copy(cache.layers[0].schedule.policy)
    monkeypatch.setattr(type(reached), "priority", lambda self, view: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        decode(model, cache, ids_of(30))
    monkeypatch.undo()
    cache.crop(100)
    assert cache.get_seq_length() == 100
    assert torch.isfinite(decode(model, cache, ids_of(20))).all()
    check(cache)


def test_a_budget_needs_a_model() -> None:
    from pikv_hf import PiKVConfig

    with pytest.raises(ValueError, match="only PiKV's attention can"):
        PiKVCache(shared_model().config, PiKVConfig(budget=64))


def test_another_attention_cannot_pass_over_evicted_tokens() -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = make_cache(model, budget=56)
    read(model, cache, ids_of(100))
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="evicted, which only attn_implementation='pikv'"):
        model(ids_of(1), past_key_values=cache)
    attach(model)
    assert torch.isfinite(decode(model, cache, ids_of(3))).all()


# Together with what else evicts, shortens and rearranges


@pytest.mark.parametrize("budget", [64, 0.4, "140KB"])
def test_a_press_that_keeps_more_than_the_budget(budget: Any) -> None:
    """What a press keeps of each head is cut down to the budget, at once and later."""
    model = shared_model()
    cache = make_cache(model, budget=budget, placement="hash")
    read(model, cache, ids_of(140))
    for layer in cache.layers:
        kept = torch.rand(1, 2, layer.seen) < 0.9
        was = layer.held()
        layer.keep(kept)
        assert not bool((layer.held() & ~(was & kept)).any())
        assert torch.equal(layer.held()[:, :, -16:], (was & kept)[:, :, -16:])
    check(cache)
    decode(model, cache, ids_of(40))
    check(cache)


@pytest.mark.parametrize("budget", [64, 0.4, "70KB"])
def test_assigned_tokens_are_cut_down_to_the_budget(budget: Any) -> None:
    """As kvpress assigns them, more than the budget allows."""
    model = shared_model()
    cache = make_cache(model, budget=budget)
    read(model, cache, ids_of(30))
    for layer in cache.layers:
        layer.keys, layer.values = torch.randn(1, 2, 150, 16), torch.randn(1, 2, 150, 16)
        assert layer.seen == 150
        assert bool(layer.held()[:, :, -16:].all())
    check(cache)
    assert all(layer.schedule.tokens_evicted > 0 for layer in cache.layers)
    decode(model, cache, ids_of(20))
    check(cache)


def test_a_press_reads_its_context_before_the_budget_cuts_it() -> None:
    from pikv_hf.presses import PyramidPress

    model = shared_model()
    cache = make_cache(model, budget=64, placement="hash")
    read(model, cache, ids_of(120), press=PyramidPress(window=8, compression_ratio=0.2))
    check(cache)
    decode(model, cache, ids_of(30))
    check(cache)


@pytest.mark.parametrize("budget", [56, 0.3, "160KB"])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_cropping_selecting_and_reordering(budget: Any, codec: str) -> None:
    """Nothing that was evicted comes back, and what is held is what attention reads."""
    model = shared_model()
    cache = make_cache(model, budget=budget, key_codec=codec)
    run(model, cache, ids_of(120, batch=2), 90, 45)
    held_before = [layer.held() for layer in cache.layers]
    cache.crop(-13)
    assert all(torch.equal(layer.held(), was[:, :, :-13]) for layer, was in zip(cache.layers, held_before, strict=True))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(
        torch.equal(layer.held(), was[[1, 0], :, :-13]) for layer, was in zip(cache.layers, held_before, strict=True)
    )
    cache.batch_select_indices(torch.tensor([1]))
    check(cache)
    run(model, cache, ids_of(40), 20, 20)
    cache.batch_repeat_interleave(2)
    check(cache)
    decode(model, cache, ids_of(20, batch=2))
    check(cache)


def test_an_answer_is_cut_off_again() -> None:
    """kvpress's pipeline asks for lengths before a question and cuts layers back after it."""
    model = shared_model()
    for budget in (56, "160KB"):
        cache = make_cache(model, budget=budget, key_codec="int4", value_codec="int4", placement="hash")
        read(model, cache, ids_of(100))
        lengths = [cache.get_seq_length(index) for index in range(2)]
        decode(model, cache, ids_of(40))
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            assert layer.seen == 100
        check(cache)
        decode(model, cache, ids_of(20))
        check(cache)


def test_a_later_prompt_after_reset_starts_anew() -> None:
    model = shared_model()
    cache = make_cache(model, budget=56)
    run(model, cache, ids_of(100), 80, 80)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    run(model, cache, ids_of(100, batch=3), 80, 80)
