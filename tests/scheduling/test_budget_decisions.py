"""Which pages go when a budget is full, against slow statistics of every page."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import scheduling_reference as slow
import torch
from budget_runs import make_cache
from families import FAMILIES
from press_runs import ids_of

from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.scheduling.page_scheduler import PageScheduler
from pikv_hf.scheduling.policies.registry import PageStats, SchedulingPolicy


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
    watch = Watch(layer.parts[0].scheduler.policy)
    layer.parts[0].scheduler.policy = watch
    begin_step = PageScheduler.begin_step

    def begin(schedule: PageScheduler, table: Any) -> None:
        begin_step(schedule, table)
        before["usage"] = table.plain.usage.shares[0].clone(), table.plain.usage.steps[3].clone()

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
    usage, (row,), now = layer.table.plain.usage, layer.table.rows, layer.parts[0].scheduler.now
    for page in row.pages().tolist():
        first = int(layer.table.plain.positions[page, 0])
        if first + 7 not in pages:
            pages[first + 7] = Noted(first, now - 1, first + 7, 8, 0)
        noted = pages[first + 7]
        if layer.table.plain.shard[page] >= 0 and not noted.in_shard:
            noted.enter(now - 1)
        if page < len(shares):
            noted.shares.append((now, float(usage.shares[0, page] - shares[page])))
            if usage.steps[3, page] > uses[page]:
                noted.uses.append(now)
        else:
            noted.shares.append((now, float(usage.shares[0, page])))
