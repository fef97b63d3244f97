"""Budgets that cannot be kept are refused, and nothing changes."""

import copy
from typing import Any

import pytest
import torch
from budget_runs import LEAST, check, decode, make_cache, run, shared_model
from families import FAMILIES
from press_runs import ids_of, read

from pikv_hf import PiKVCache, attach
from pikv_hf.scheduling.growth_limit import BudgetError


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
    before = [(layer.stored_mask(), *layer.dense()) for layer in cache.layers]
    with pytest.raises(BudgetError, match=r"37500 bytes per layer.*of 8 rows may take \d+"):
        cache.batch_repeat_interleave(8)
    for layer, then in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then, (layer.stored_mask(), *layer.dense()), strict=True))
    assert decode(model, cache, ids_of(1)).shape[0] == 1


def test_a_failed_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that does not fit, and a policy that fails."""
    model = shared_model()
    cache = make_cache(model, budget=56)
    run(model, cache, ids_of(100), 80, 40)
    before = [(layer.seen, layer.stored_mask(), *layer.dense()) for layer in cache.layers]

    def unchanged() -> bool:
        now = [(layer.seen, layer.stored_mask(), *layer.dense()) for layer in cache.layers]
        return all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b
            for then, after in zip(before, now, strict=True)
            for a, b in zip(then, after, strict=True)
        )

    with pytest.raises(ValueError, match="but the cache holds"):
        cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    assert unchanged()
    reached = copy.copy(cache.layers[0].parts[0].scheduler.policy)
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
