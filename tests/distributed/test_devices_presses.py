"""Presses on several devices keep what they keep on one."""

import pytest
import torch
from device_runs import SMALL, assert_spread, shared_model, spread
from press_runs import PRESSES, held_by, ids_of, next_logits, padded, read
from transformers import DynamicCache

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("press", PRESSES)
def test_presses_keep_what_they_keep_on_one_device(press: str) -> None:
    model, ids, devices = shared_model(), ids_of(120), 2 + list(PRESSES).index(press) % 2
    alone, many = (
        read(model, spread(model, number), ids, PRESSES[press](compression_ratio=0.5)) for number in (1, devices)
    )
    for one, other in zip(held_by(alone), held_by(many), strict=True):
        assert torch.equal(one, other)
    assert_spread(many)
    # Pages of low rank or few bits are others in a part: their errors differ.
    tolerance = 1e-4 if press not in ("pikv", "lora") else 1.0
    ours, theirs = (next_logits(model, cache, 120, steps=12) for cache in (many, alone))
    assert (ours - theirs).abs().mean() <= tolerance
    assert_spread(many)


@pytest.mark.parametrize("press", ["query_aware", "pyramid", "duo"])
def test_presses_on_padded_batches(press: str) -> None:
    model = shared_model()
    _, ids, mask = padded([100, 61, 88])
    alone, many = (
        read(model, spread(model, number), ids, PRESSES[press](compression_ratio=0.4), mask) for number in (1, 3)
    )
    for one, other in zip(held_by(alone), held_by(many), strict=True):
        assert torch.equal(one, other)
    assert_spread(many)


@pytest.mark.parametrize("name", ["KnormPress", "AdaKVPress"])
def test_presses_of_kvpress(name: str) -> None:
    """One assigns keys and values of the layer, the other marks tokens of single heads."""
    import kvpress

    model, ids = shared_model(), ids_of(150)
    press = kvpress.KnormPress(0.5) if name == "KnormPress" else kvpress.AdaKVPress(kvpress.KnormPress(0.5))
    alone, many = (read(model, spread(model, number), ids, press) for number in (1, 3))
    for one, other in zip(alone.layers, many.layers, strict=True):
        assert torch.equal(one.stored_mask(), other.stored_mask())
        torch.testing.assert_close(other.keys, one.keys)
        torch.testing.assert_close(other.values, one.values)
    ours, theirs = (next_logits(model, cache, 150, steps=30) for cache in (many, alone))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert_spread(many)


def test_assigned_tokens_are_spread() -> None:
    model = shared_model()
    cache, plain = spread(model, 3), DynamicCache(config=model.config)
    for each in (cache, plain):
        read(model, each, ids_of(200))
        for layer in each.layers:
            keys, values = layer.keys, layer.values
            layer.keys, layer.values = keys[:, :, ::2].contiguous(), values[:, :, ::2].contiguous()
    assert all(layer.get_seq_length() == 100 for layer in cache.layers)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        held = [sum(table.tokens()) for table in ours.store.tables()]
        assert sum(held) == 100
        assert max(held) <= 100 / 3 + 2 * SMALL["page_size"]
