"""Budgets together with what else evicts, shortens and rearranges a cache."""

from typing import Any

import pytest
import torch
from budget_runs import check, decode, make_cache, run, shared_model
from press_runs import ids_of, read

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("budget", [64, 0.4, "140KB"])
def test_a_press_that_keeps_more_than_the_budget(budget: Any) -> None:
    """What a press keeps of each head is cut down to the budget, at once and later."""
    model = shared_model()
    cache = make_cache(model, budget=budget, placement="hash")
    read(model, cache, ids_of(140))
    for layer in cache.layers:
        kept = torch.rand(1, 2, layer.seen) < 0.9
        was = layer.stored_mask()
        layer.keep(kept)
        assert not bool((layer.stored_mask() & ~(was & kept)).any())
        assert torch.equal(layer.stored_mask()[:, :, -16:], (was & kept)[:, :, -16:])
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
        assert bool(layer.stored_mask()[:, :, -16:].all())
    check(cache)
    # Layers share the budget: one may have room for what another evicts.
    assert any(layer.parts[0].scheduler.tokens_evicted > 0 for layer in cache.layers)
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
    held_before = [layer.stored_mask() for layer in cache.layers]
    cache.crop(-13)
    assert all(
        torch.equal(layer.stored_mask(), was[:, :, :-13]) for layer, was in zip(cache.layers, held_before, strict=True)
    )
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(
        torch.equal(layer.stored_mask(), was[[1, 0], :, :-13])
        for layer, was in zip(cache.layers, held_before, strict=True)
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
