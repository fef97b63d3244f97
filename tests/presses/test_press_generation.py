"""Presses that go on while tokens are generated: the budget holds after every step, and nothing else changes."""

import gc
from typing import Any

import pytest
import torch
from press_runs import EVICTING, attached, ids_of, padded, shared_model
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.presses import LoRAPress, PiKVPress, QueryAwarePress

PROMPT, STEPS, INTERVAL = 90, 40, 8


def steps(model: Any, cache: Any, press: Any, ids: torch.Tensor, count: int = STEPS, mask: Any = None) -> Any:
    """Yield the logits of a prompt's last token and of greedy tokens after it, each when the cache holds them."""
    at = torch.arange(ids.shape[1])[None] if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with press(model), torch.no_grad():
        for _ in range(count + 1):
            logits = model(ids, past_key_values=cache, position_ids=at, attention_mask=mask).logits[:, -1]
            yield logits
            ids, at = logits.argmax(-1, keepdim=True), at[:, -1:] + 1
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)


def held(cache: PiKVCache) -> int:
    return max(int(layer.stored_mask().sum(-1).max()) for layer in cache.layers)


# Duo's heads that look things up hold everything, in what share the budget asks for.
@pytest.mark.parametrize("name", sorted(EVICTING.keys() - {"duo"}))
@pytest.mark.parametrize(("budget", "most"), [(40, lambda seen: 40), ("50%", lambda seen: 0.5 * seen)])
def test_a_budget_of_tokens_holds_after_every_step(name: str, budget: Any, most: Any) -> None:
    model = shared_model()
    cache = attached(model, num_shards=1)
    press = EVICTING[name](budget=budget, compression_interval=INTERVAL)
    counts = []
    for seen, _ in enumerate(steps(model, cache, press, ids_of(PROMPT)), start=PROMPT):
        counts.append(sum(int(layer.stored_mask().sum()) for layer in cache.layers))
        # Falling budgets and those of heads are of all together.
        lanes = sum(layer.stored_mask().shape[1] for layer in cache.layers)
        assert counts[-1] <= lanes * most(seen) + 1e-6
    # What is decided is not less than it has to be.
    assert max(counts) >= 0.8 * lanes * most(PROMPT)


@pytest.mark.parametrize("budget", ["24 KiB", 0.4])
def test_a_budget_of_bytes_holds_after_every_step(budget: Any) -> None:
    model = shared_model()
    cache = attached(model, num_shards=1, recent_window=0, sink_tokens=0)
    dense = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids_of(PROMPT), past_key_values=dense)
    token = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers) // PROMPT
    press = PiKVPress(budget=budget, compression_interval=INTERVAL)
    sizes = []
    for seen, _ in enumerate(steps(model, cache, press, ids_of(PROMPT)), start=PROMPT):
        gc.collect()
        sizes.append(cache.nbytes)
        assert sizes[-1] <= (24 * 1024 if budget != 0.4 else 0.4 * seen * token)
    assert max(sizes) > 0.7 * (24 * 1024 if budget != 0.4 else 0.4 * PROMPT * token)


def test_packed_tokens_never_get_wider() -> None:
    model = shared_model()
    cache = attached(model, num_shards=1, recent_window=0, sink_tokens=0)
    before: list[torch.Tensor] = []
    for _ in steps(model, cache, PiKVPress(budget="16 KiB", compression_interval=INTERVAL), ids_of(PROMPT)):
        masks = [layer.stored_mask() for layer in cache.layers]
        for earlier, now in zip(before, masks, strict=False):
            assert not bool((now[:, :, : earlier.shape[-1]] & ~earlier).any())
        before = masks


@pytest.mark.parametrize("press", [QueryAwarePress, PiKVPress])
def test_a_budget_that_holds_everything_changes_no_token(press: Any) -> None:
    model = shared_model()
    ids = ids_of(PROMPT)
    given = {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **given)
    with press(budget=10_000, compression_interval=INTERVAL)(model):
        got = model.generate(ids, past_key_values=attached(model), **given)
    assert torch.equal(got, expected)


def test_rows_are_what_they_are_alone() -> None:
    model = shared_model()
    rows, ids, mask = padded([90, 71])

    def press() -> QueryAwarePress:
        return QueryAwarePress(budget=40, window=8, compression_interval=INTERVAL)

    together = attached(model, num_shards=1)
    both = torch.stack(list(steps(model, together, press(), ids, mask=mask)))
    # Decisions come when the longest row has seen a multiple; a row alone has seen as many when both have no padding.
    alone = attached(model, num_shards=1)
    first = torch.stack(list(steps(model, alone, press(), rows[0])))
    torch.testing.assert_close(both[:, :1], first, rtol=0, atol=1e-4)
    assert held(together) <= 40


def test_what_cannot_be_decided_is_refused() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match="compression_interval must be at least 1 token, got 0"):
        QueryAwarePress(budget=40, compression_interval=0)
    with pytest.raises(ValueError, match="compression_interval=8: what LoRAPress leaves behind is a codec"):
        LoRAPress(rank=4, compression_interval=8)
    with pytest.raises(ValueError, match="a DynamicLayer no longer knows their positions"):
        next(steps(model, DynamicCache(), QueryAwarePress(budget=40, compression_interval=8), ids_of(PROMPT)))


@pytest.mark.parametrize("interval", [64, 512])
@pytest.mark.parametrize("budget", [40, "50%"])
@pytest.mark.parametrize("press", [QueryAwarePress, PiKVPress])
def test_an_interval_that_is_no_shorter_than_the_budget_leaves_most_of_it_to_the_prompt(
    press: Any, budget: Any, interval: int
) -> None:
    model = shared_model()
    cache = attached(model, num_shards=1, recent_window=0, sink_tokens=0, page_size=4)
    for step, _ in enumerate(steps(model, cache, press(budget=budget, compression_interval=interval), ids_of(60))):
        counts = torch.stack([layer.stored_mask().sum(-1) for layer in cache.layers]).float()
        if step == 0:
            assert float(counts.mean()) >= 0.6 * 30
        if press is QueryAwarePress:
            assert float(counts.mean()) <= (40 if budget == 40 else 0.5 * (60 + step)) + 1e-6


def test_a_cache_that_was_cropped_or_reset_is_decided_again_soon() -> None:
    model = shared_model()
    cache = attached(model, num_shards=1)
    press = QueryAwarePress(budget=40, window=8, compression_interval=INTERVAL)
    with press(model), torch.no_grad():
        model(ids_of(PROMPT), past_key_values=cache)
        cache.reset()
        for at in range(60):
            model(ids_of(1, seed=at), past_key_values=cache)
            assert held(cache) <= 40
        cache.crop(50)
        for at in range(20):
            model(ids_of(1, seed=at), past_key_values=cache)
            assert held(cache) <= 40


@pytest.mark.parametrize("press", [QueryAwarePress, PiKVPress])
def test_caches_in_turn_are_what_they_are_alone(press: Any) -> None:
    """Of other rows, of the same rows, and one whose rows are repeated."""
    model = shared_model()

    def alone(batch: int, seed: int) -> list[torch.Tensor]:
        return list(
            steps(model, attached(model), press(budget=40, compression_interval=10_000), ids_of(60, batch, seed), 4)
        )

    expected = {1: alone(1, 1), 2: alone(2, 2)}
    caches = {1: attached(model), 2: attached(model)}
    ids = {1: ids_of(60, 1, 1), 2: ids_of(60, 2, 2)}
    with press(budget=40, compression_interval=10_000)(model), torch.no_grad():
        for step in range(3):
            for rows, cache in caches.items():
                logits = model(ids[rows], past_key_values=cache).logits[:, -1]
                torch.testing.assert_close(logits, expected[rows][step], rtol=0, atol=1e-4)
                ids[rows] = logits.argmax(-1, keepdim=True)
        caches[1].batch_repeat_interleave(3)
        repeated = model(ids[1].expand(3, -1), past_key_values=caches[1]).logits[:, -1]
    torch.testing.assert_close(repeated, expected[1][3].expand(3, -1), rtol=0, atol=1e-4)


def test_bytes_without_room_for_the_tokens_to_come_are_refused() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match=r"PiKVPress: .+ bytes leave no room for the .+ \(compression_interval=64\)"):
        next(steps(model, attached(model), PiKVPress(budget="6 KiB", compression_interval=64), ids_of(PROMPT)))
