"""What a budget keeps is decided as PiKVPress decides it: by token, head, layer and width."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from budget_runs import check, decode, gave_way, make_cache, paged_layers, run, shared_model
from eviction_machine import bits_of_tokens
from families import FAMILIES
from press_runs import ids_of, padded, read

from pikv_hf import PiKVCache
from pikv_hf.allocation.token_widths import LAYER_BYTES
from pikv_hf.layer import joint_budget
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.presses import PiKVPress

EXACT: dict[str, Any] = {"recent_window": 0, "sink_tokens": 4, "placement": "hash"}


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """Yield the bytes that decisions were made for, and the widths that layers were given, as they come."""
    budgets: list[int] = []
    widths: list[torch.Tensor] = []
    decide, keep = joint_budget.token_widths, joint_budget.keep_tokens

    def noted_decision(layers: Any, budget: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        budgets.append(budget)
        return decide(layers, budget, *args, **kwargs)

    def noted_keep(store: Any, kept: torch.Tensor) -> None:
        widths.append(kept.clone())
        keep(store, kept)

    with patch.context() as patched:
        patched.setattr(joint_budget, "token_widths", noted_decision)
        patched.setattr(joint_budget, "keep_tokens", noted_keep)
        yield budgets, widths


def widths_of_press(model: Any, ids: torch.Tensor, nbytes: int, patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return the widths that the press gives each layer of a prompt for the same bytes of pages."""
    given: list[torch.Tensor] = []
    keep = PiKVLayer.keep

    def noted(layer: PiKVLayer, kept: torch.Tensor) -> None:
        given.append(kept.clone())
        keep(layer, kept)

    cache = make_cache(model, **EXACT)
    with patch.context() as patched:
        patched.setattr(PiKVLayer, "keep", noted)
        read(model, cache, ids, press=PiKVPress(budget=f"{nbytes + len(cache.layers) * LAYER_BYTES} B"))
    return given


@pytest.mark.parametrize("budget", [60, 0.25, "60KB"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_the_decision_is_that_of_the_press(budget: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = shared_model(family), ids_of(240)
    cache = make_cache(model, budget=budget, scheduler="joint", **EXACT)
    with watched(monkeypatch) as (budgets, widths):
        read(model, cache, ids)
    kept = widths[-len(cache.layers) :]
    assert len({int(width) for given in kept for width in given.unique()}) > 1
    expected = widths_of_press(model, ids, budgets[-1], monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(kept, expected, strict=True))
    check(cache)


@pytest.mark.parametrize("budget", [60, 0.25])
def test_rows_of_a_batch_are_decided_as_if_alone(budget: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding, which is not stored, and of which no query counts."""
    model = shared_model("llama")
    rows, ids, mask = padded([200, 131])
    together, alone = make_cache(model, budget=budget, scheduler="joint", **EXACT), []
    with watched(monkeypatch) as (_, widths):
        read(model, together, ids, mask=mask)
        both = widths[-2:]
        for row in rows:
            read(model, make_cache(model, budget=budget, scheduler="joint", **EXACT), row)
            alone.append(widths[-2:])
    check(together)
    for layer in range(2):
        for number, row in enumerate(rows):
            assert torch.equal(both[layer][number, :, -row.shape[1] :], alone[number][layer][0])
            assert not bool(both[layer][number, :, : -row.shape[1]].any())


@pytest.mark.parametrize("budget", [80, 0.4, "100KB"])
@pytest.mark.parametrize("chunk", [31, 64])
def test_chunks_and_decoding_keep_to_the_budget(budget: Any, chunk: int) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget, scheduler="joint")
    run(model, cache, ids_of(360, batch=2), 250, chunk)
    assert all(map(gave_way, paged_layers(cache)))
    assert any(len(layer.table.pools.packed) > 1 for layer in cache.layers)


@pytest.mark.parametrize("budget", [64, 0.4])
def test_sinks_and_recent_tokens_stay(budget: Any) -> None:
    model = shared_model()
    cache = make_cache(model, budget=budget, scheduler="joint")
    for part in (*ids_of(200).split(50, dim=1), *ids_of(60, seed=2).split(1, dim=1)):
        with torch.no_grad():
            model(part, past_key_values=cache)
        for layer in cache.layers:
            there = layer.stored_mask()
            assert bool(there[:, :, :4].all())
            assert bool(there[:, :, -16:].all())


def test_forks_go_on_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork decides for its own layers, and its original is left as it was."""
    model, ids = shared_model(), ids_of(200)
    cache = make_cache(model, budget=64, scheduler="joint")
    run(model, cache, ids[:, :150], 140, 70)
    fork = cache.fork()
    before = [(layer.stored_mask(), *layer.dense()) for layer in cache.layers]
    logits = decode(model, fork, ids[:, 150:])
    check(fork)
    for layer, then in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then, (layer.stored_mask(), *layer.dense()), strict=True))
    torch.testing.assert_close(decode(model, cache, ids[:, 150:]), logits)
    check(cache)


def test_a_saved_cache_goes_on_as_it_would_have(tmp_path: Any) -> None:
    model, ids = shared_model(), ids_of(200)
    cache = make_cache(model, budget=64, scheduler="joint")
    run(model, cache, ids[:, :150], 140, 70)
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    check(loaded)
    torch.testing.assert_close(decode(model, loaded, ids[:, 150:]), decode(model, cache, ids[:, 150:]))
    check(loaded)


def test_a_decision_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have taken what they keep when another fails: none has."""
    model, ids = shared_model(), ids_of(100)
    cache = make_cache(model, budget=56, scheduler="joint")
    read(model, cache, ids[:, :60])
    before = [(layer.stored_mask(), *layer.dense()) for layer in cache.layers]
    keep, calls = joint_budget.keep_tokens, []

    def failing(store: Any, kept: torch.Tensor) -> None:
        calls.append(store)
        if len(calls) == 2:
            raise MemoryError
        keep(store, kept)

    with monkeypatch.context() as patched:
        patched.setattr(joint_budget, "keep_tokens", failing)
        with torch.no_grad(), pytest.raises(MemoryError):
            model(ids[:, 60:], past_key_values=cache)
    cache.crop(60)
    for layer, then in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then, (layer.stored_mask(), *layer.dense()), strict=True))
    read(model, cache, ids[:, 60:])
    check(cache)


def test_a_press_decides_before_the_budget_does() -> None:
    model = shared_model()
    cache = make_cache(model, budget=100, scheduler="joint")
    read(model, cache, ids_of(160), press=PiKVPress(compression_ratio=0.9))
    assert all(layer.parts[0].scheduler.tokens_evicted == 0 for layer in cache.layers)
    check(cache)


def test_one_budget_for_all_layers_or_one_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model()
    for scope, decisions in (("layer", 2), ("cache", 1)):
        cache = make_cache(model, budget=112, budget_scope=scope, scheduler="joint", **EXACT)
        with watched(monkeypatch) as (budgets, _):
            read(model, cache, ids_of(300))
        assert len(budgets) == decisions
        check(cache)


@pytest.mark.parametrize("budget", [64, 0.25, "100KB"])
def test_layers_decide_together_by_default(budget: Any) -> None:
    cache = make_cache(shared_model(), budget=budget)
    assert all(layer.decides_jointly for layer in cache.layers)
    assert "scheduler='joint'" in repr(cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_codec": "int4"}, "key_codec='int4'"),
        ({"budget_scope": "shard"}, "budget_scope='shard'"),
        ({"tiers": {"cpu": None}}, "tiers="),
    ],
)
def test_what_leaves_no_room_for_widths_is_named(options: dict[str, Any], message: str) -> None:
    """Without a scheduler pages go by their own policy, as they did."""
    model = shared_model()
    with pytest.raises(ValueError, match=f"scheduler='joint' decides by token and width, which {message}"):
        make_cache(model, budget=64, scheduler="joint", **options)
    cache = make_cache(model, budget=64, **options)
    assert not any(layer.decides_jointly for layer in cache.layers)
    assert "scheduler='pikv'" in repr(cache)


def test_models_that_cannot_decide_jointly() -> None:
    """Latents have no values by which a token could be judged."""
    model = FAMILIES["deepseek_v3"].build(num_hidden_layers=2)
    with pytest.raises(ValueError, match="scheduler='joint' decides by token and width, which cannot be done"):
        make_cache(model, budget=64, scheduler="joint")
    for cache in (make_cache(model, budget=64), make_cache(shared_model(), budget=64, devices=["cpu:0", "cpu:1"])):
        assert not any(layer.decides_jointly for layer in cache.layers)
        assert "scheduler='pikv'" in repr(cache)
    with pytest.raises(ValueError, match="over 2 devices or processes"):
        make_cache(shared_model(), budget=64, devices=["cpu:0", "cpu:1"], scheduler="joint")


def test_packed_tokens_get_narrower_and_never_wider() -> None:
    """Of what was packed some is packed again in fewer bits; nothing has more bits than it had."""
    model = shared_model()
    cache = make_cache(model, budget=64, recent_window=8, scheduler="joint")
    read(model, cache, ids_of(100))
    before, narrowed = [bits_of_tokens(layer) for layer in cache.layers], 0
    for token in ids_of(120, seed=3).split(1, dim=1):
        with torch.no_grad():
            model(token, past_key_values=cache)
        for index, layer in enumerate(cache.layers):
            now, known = bits_of_tokens(layer), before[index]
            both = (now[:, :, : known.shape[2]] > 0) & (known > 0)
            change = (now[:, :, : known.shape[2]] - known)[both]
            assert bool((change <= 0).all())
            narrowed += int((change < 0).sum())
            before[index] = now
    assert narrowed > 0
