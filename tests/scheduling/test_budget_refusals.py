"""Budgets that cannot be kept are refused, and nothing changes."""

import copy
from typing import Any

import pytest
import torch
from budget_runs import LEAST, check, decode, make_cache, run, shared_model
from families import FAMILIES
from press_runs import ids_of, read

from pikv_hf import PiKVCache, attach
from pikv_hf.common.budget import bytes_text, parse_bytes
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
    with torch.no_grad(), pytest.raises(BudgetError, match=r"budget='40KB' is too small for 1 sequence: ") as refused:
        model(ids_of(60), past_key_values=cache)
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    assert "recent_window=, sink_tokens=, page_size= (now 8) or num_shards= (now " in str(refused.value)


@pytest.mark.parametrize("options", [{}, {"budget_scope": "layer"}, {"scheduler": "ada_kv"}, {"key_codec": "int4"}])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_budget_that_a_refusal_names_is_kept(options: dict[str, Any], batch: int) -> None:
    model = shared_model()
    with pytest.raises(BudgetError, match=r"need budget='[0-9.]+KiB' at the least") as refused:
        read(model, make_cache(model, budget="10KB", **options), ids_of(60, batch))
    smallest = str(refused.value).partition("need budget='")[2].partition("'")[0]
    cache = make_cache(model, budget=smallest, **options)
    read(model, cache, ids_of(300, batch))
    decode(model, cache, ids_of(20, batch))
    scale = 2 if options.get("budget_scope") == "layer" else 1
    assert cache.nbytes <= scale * parse_bytes(smallest)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (1023, "1023B"), (1024, "1.0KiB"), (1025, "1.1KiB"), (5 << 20, "5.0MiB")]
)
def test_budgets_in_messages_are_rounded_up(count: int, text: str) -> None:
    assert bytes_text(count) == text
    assert parse_bytes(text) >= count


def test_too_many_rows_are_refused_and_nothing_changes() -> None:
    model = shared_model()
    cache = make_cache(model, budget="75KB")
    read(model, cache, ids_of(90))
    before = [(layer.stored_mask(), *layer.dense()) for layer in cache.layers]
    with pytest.raises(BudgetError, match=r"budget='75KB' is too small for 8 sequences"):
        cache.batch_repeat_interleave(8)
    for layer, then in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then, (layer.stored_mask(), *layer.dense()), strict=True))
    assert decode(model, cache, ids_of(1)).shape[0] == 1


def test_a_failed_update_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that does not fit, and a policy that fails."""
    model = shared_model()
    cache = make_cache(model, budget=56, scheduler="pikv")
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
    cache = make_cache(model, budget=56, scheduler="pikv")
    read(model, cache, ids_of(100))
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="evicted, which only attn_implementation='pikv'"):
        model(ids_of(1), past_key_values=cache)
    attach(model)
    assert torch.isfinite(decode(model, cache, ids_of(3))).all()
