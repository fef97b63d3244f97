"""Tokens assigned from outside and tokens kept by KV head, against dense attention."""

import gc
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.layer.layer_cropping import cropped_length

OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 4}


def prompt(batch: int = 1, tokens: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 190, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def filled(model: Any, batch: int = 1, **options: Any) -> PiKVCache:
    cache = PiKVCache.for_model(model, **{**OPTIONS, **options})
    with torch.no_grad():
        model(prompt(batch), past_key_values=cache)
    return cache


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build()


def masked_reference(model: Any, context: torch.Tensor, new: torch.Tensor, keep: list[torch.Tensor]) -> torch.Tensor:
    """Return logits of `new` after `context`, of which KV heads see only `keep`, `(B, H, T)` per layer."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        model(context, past_key_values=cache)
        hooks = []
        for layer, kept in zip(model.model.layers, keep, strict=True):

            def before(module: Any, args: Any, kwargs: Any, kept: torch.Tensor = kept) -> Any:
                queries = kwargs["hidden_states"].shape[1]
                groups = module.config.num_attention_heads // kept.shape[1]
                past = kept.repeat_interleave(groups, 1)[:, :, None].expand(-1, -1, queries, -1)
                causal = torch.ones(queries, queries, dtype=torch.bool).tril().expand(*past.shape[:2], -1, -1)
                return args, {**kwargs, "attention_mask": torch.cat([past, causal], dim=-1)}

            hooks.append(layer.self_attn.register_forward_pre_hook(before, with_kwargs=True))
        try:
            return model(new, past_key_values=cache).logits
        finally:
            for hook in hooks:
                hook.remove()


def bytes_in_use(cache: PiKVCache) -> int:
    """Return the bytes of K/V in pages that hold tokens."""
    return sum(layer.keys + layer.values - layer.free for layer in cache.memory_report().layers)


def random_keep(cache: PiKVCache, share: float = 0.5, seed: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (cache.layers[0].batch, cache.layers[0].store.heads, cache.layers[0].seen)
    return [torch.rand(shape, generator=generator) < share for _ in cache.layers]


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_keep_their_own_tokens(model: Any, batch: int, new: int) -> None:
    cache = filled(model, batch)
    keep = random_keep(cache)
    for layer, kept in zip(cache.layers, keep, strict=True):
        layer.keep(kept)
        assert torch.equal(layer.stored_mask(), kept)
    more = prompt(batch, new, seed=3)
    with torch.no_grad():
        logits = model(more, past_key_values=cache).logits
        after = cache.fork()
        again = model(prompt(batch, 3, seed=4), past_key_values=after).logits
    expected = masked_reference(model, prompt(batch), more, keep)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 61 + new
    cache.crop(61)
    with torch.no_grad():
        model.set_attn_implementation("pikv")
        torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(model(prompt(batch, 3, seed=4), past_key_values=cache).logits, again)


def test_eviction_frees_its_memory(model: Any) -> None:
    big = FAMILIES["qwen3_moe"].build(head_dim=64)
    cache = PiKVCache.for_model(big, page_size=8, recent_window=16)
    with torch.no_grad():
        big(prompt(1, 1200), past_key_values=cache)
    whole = cache.nbytes
    for layer, kept in zip(cache.layers, random_keep(cache), strict=True):
        layer.keep(kept)
    gc.collect()
    assert cache.nbytes < 0.55 * whole
    everything = cache.nbytes
    for layer in cache.layers:
        layer.keep(torch.zeros_like(layer.stored_mask()))
        assert not layer.stored_mask().any()
    assert cache.nbytes < 0.02 * everything


@pytest.mark.parametrize("codec", ["int8", "int4", "int2", "fp8", "auto"])
def test_packed_tokens_stay_as_they_are(model: Any, codec: str) -> None:
    cache = filled(model, 2, key_codec=codec, value_codec=codec)
    layer = cache.layers[1]
    layer.settle()
    before = [part.clone() for part in layer.dense()]
    packed = layer.table.view.stored_mask(61, layer.table.pools.packed)[:, None, :]
    assert packed.any()
    kept = random_keep(cache)[1]
    layer.keep(kept)
    for then, now in zip(before, layer.dense(), strict=True):
        torch.testing.assert_close(now * packed[..., None], then * (kept & packed)[..., None], atol=1e-6, rtol=1e-5)
    before = [part.clone() for part in layer.dense()]
    fewer = kept & random_keep(cache, seed=7)[1]
    layer.keep(fewer)
    for then, now in zip(before, layer.dense(), strict=True):
        torch.testing.assert_close(now, then * fewer.unsqueeze(-1), atol=1e-6, rtol=1e-5)


def test_widths_are_what_was_asked_for(model: Any) -> None:
    cache = filled(model)
    layer = cache.layers[0]
    keys, values = (part.clone() for part in layer.dense())
    widths = torch.tensor([0, 2, 4, 8, 16], dtype=torch.uint8).repeat(13)[:61].expand(1, layer.store.heads, 61).clone()
    widths[:, 1] = widths[:, 1].flip(-1)
    layer.keep(widths)
    by_codec = {entry.codec: entry.tokens for entry in cache.memory_report().layers[0].codecs if entry.tokens}
    assert set(by_codec) == {"none", "int8", "int4", "int2"}
    for now, then in zip(layer.dense(), (keys, values), strict=True):
        error = (now - then).square().sum(-1) / then.square().sum(-1)
        worst = [float(error[widths == width].max()) for width in (16, 8, 4, 2)]
        assert worst[0] == 0
        assert worst == sorted(worst)
        assert worst[-1] < 1
        assert (error[widths == 0] == 1).all()


def test_what_cannot_be_kept_is_refused(model: Any) -> None:
    cache = filled(model)
    layer = cache.layers[0]
    with pytest.raises(ValueError, match=r"\(1, 2, 61\).*\(1, 2, 60\)"):
        layer.keep(torch.ones(1, 2, 60, dtype=torch.bool))
    with pytest.raises(ValueError, match="3"):
        layer.keep(torch.full((1, 2, 61), 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="float32"):
        layer.keep(torch.ones(1, 2, 61))
    with pytest.raises(ValueError, match="holds no tokens"):
        PiKVCache.for_model(model).layers[0].keep(torch.ones(1, 2, 0, dtype=torch.bool))


# Assignments


def test_an_assignment_rebases_a_layer(model: Any) -> None:
    cache, dynamic = filled(model), DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt(), past_key_values=dynamic)
        for index, layer in enumerate(cache.layers):
            pick = torch.randperm(61, generator=torch.Generator().manual_seed(index))[: 20 + 7 * index]
            layer.keys, layer.values = layer.keys[:, :, pick].contiguous(), layer.values[:, :, pick].contiguous()
            dynamic.layers[index].keys = dynamic.layers[index].keys[:, :, pick]
            dynamic.layers[index].values = dynamic.layers[index].values[:, :, pick]
            assert layer.get_seq_length() == cache.get_seq_length(index) == 20 + 7 * index
            torch.testing.assert_close(layer.keys, dynamic.layers[index].keys)
        # Tokens that were only picked keep their rotations: the model goes on at its own position.
        assert cache.get_seq_length() == 61
        for step in range(4):
            token, at = torch.tensor([[7 + step]]), torch.tensor([[61 + step]])
            expected = model(token, past_key_values=dynamic, position_ids=at).logits
            torch.testing.assert_close(model(token, past_key_values=cache).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["pikv", "sdpa", "eager"])
def test_layers_of_different_lengths_read_several_tokens(model: Any, attention: str) -> None:
    cache, dynamic = filled(model), DynamicCache(config=model.config)
    more = prompt(1, 5, seed=3)
    with torch.no_grad():
        model(prompt(), past_key_values=dynamic)
        for index, layer in enumerate(cache.layers):
            pick = torch.arange(61 - 9 * index - 5, 61)
            for held in (layer, dynamic.layers[index]):
                held.keys, held.values = held.keys[:, :, pick].contiguous(), held.values[:, :, pick].contiguous()
        # One token at a time needs no mask, so that DynamicCache can be the reference.
        expected = [
            model(more[:, i : i + 1], past_key_values=dynamic, position_ids=torch.tensor([[61 + i]])).logits
            for i in range(5)
        ]
        model.set_attn_implementation(attention)
        logits = model(more, past_key_values=cache).logits
        model.set_attn_implementation("pikv")
    torch.testing.assert_close(logits, torch.cat(expected, dim=1), atol=1e-4, rtol=0)


def test_rotated_keys_are_new_positions(model: Any) -> None:
    cache = filled(model)
    for layer in cache.layers:
        keys, values = layer.keys[:, :, ::2].contiguous(), layer.values[:, :, ::2].contiguous()
        layer.keys, layer.values = keys * 0.5, values
    assert cache.get_seq_length() == cache.get_seq_length(0) == 31
    cache = filled(model)
    for layer in cache.layers:
        keys, values = layer.keys[:, :, ::2].contiguous(), layer.values[:, :, ::2].contiguous()
        keys[..., 3] = 0
        layer.keys, layer.values = keys, values
    assert (cache.get_seq_length(), cache.get_seq_length(0)) == (61, 31)


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "auto", "lowrank"])
def test_a_slice_that_comes_back_is_a_crop(model: Any, codec: str) -> None:
    cache = filled(model, key_codec=codec, value_codec=codec)
    with torch.no_grad():
        before = [[part.clone() for part in layer.dense()] for layer in cache.layers]
        size = bytes_in_use(cache)
        lengths = [cache.get_seq_length(index) for index in range(len(cache.layers))]
        model(prompt(1, 7, seed=5), past_key_values=cache)
        for step in range(30):
            model(torch.tensor([[5 + step]]), past_key_values=cache)
        for layer, length in zip(cache.layers, lengths, strict=True):
            layer.keys = layer.keys[:, :, :length]
            layer.values = layer.values[:, :, :length]
    assert cache.get_seq_length() == 61
    for layer, parts in zip(cache.layers, before, strict=True):
        for now, then in zip(layer.dense(), parts, strict=True):
            torch.testing.assert_close(now, then, atol=1e-6, rtol=1e-6)
    assert bytes_in_use(cache) <= size


def test_a_slice_that_was_written_to_is_stored_anew(model: Any) -> None:
    layer = filled(model).layers[0]
    keys, values = layer.keys, layer.values
    keys[:, :, 2] += 1
    layer.keys, layer.values = keys, values
    torch.testing.assert_close(layer.dense()[0], keys, rtol=0, atol=0)


def test_wrong_assignments_change_nothing(model: Any) -> None:
    cache = filled(model)
    layer = cache.layers[0]
    before = [part.clone() for part in layer.dense()]
    layer.keys = layer.keys[:, :, :10]
    with pytest.raises(ValueError, match="equal first three sizes"):
        layer.values = layer.values[:, :, :11]
    with pytest.raises(ValueError, match="cache holds"):
        layer.keys, layer.values = torch.zeros(1, 3, 5, 16), torch.zeros(1, 3, 5, 16)
    with pytest.raises(ValueError, match="float64"):
        layer.keys, layer.values = torch.zeros(1, 2, 5, 16).double(), torch.zeros(1, 2, 5, 16).double()
    layer.keys = layer.keys[:, :, :10]
    with pytest.raises(RuntimeError, match="without values"):
        layer.settle()
    for then, now in zip(before, layer.dense(), strict=True):
        assert torch.equal(then, now)


def test_evicted_tokens_that_are_assigned_back_stay_evicted(model: Any) -> None:
    cache = filled(model)
    keep = random_keep(cache)
    more = prompt(1, 5, seed=3)
    for layer, kept in zip(cache.layers, keep, strict=True):
        layer.keep(kept)
        keys, values = layer.keys, layer.values
        layer.keys, layer.values = keys.clone(), values.clone()
        assert torch.equal(layer.stored_mask(), kept)
    with torch.no_grad():
        logits = model(more, past_key_values=cache).logits
    torch.testing.assert_close(logits, masked_reference(model, prompt(), more, keep), atol=1e-4, rtol=0)


def test_evicted_tokens_need_an_attention_that_passes_over_them(model: Any) -> None:
    unattached = PiKVCache(model.config)
    unattached.update(torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), 0)
    with pytest.raises(ValueError, match="for_model"):
        unattached.layers[0].keep(torch.ones(1, 2, 9, dtype=torch.bool))
    cache = filled(model)
    cache.layers[0].keep(random_keep(cache)[0])
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="evicted"), torch.no_grad():
        model(prompt(1, 2), past_key_values=cache)


def test_padded_rows_are_not_taken_for_tokens(model: Any) -> None:
    cache = PiKVCache.for_model(model, **OPTIONS)
    mask = torch.ones(2, 61, dtype=torch.long)
    mask[1, :9] = 0
    with torch.no_grad():
        model(prompt(2), attention_mask=mask, past_key_values=cache)
    layer = cache.layers[0]
    layer.keys = layer.keys[:, :, 5:]
    with pytest.raises(ValueError, match="RowwisePress"):
        layer.values = layer.values[:, :, 5:]
    assert layer.seen == 61


def test_a_crop_into_assigned_tokens_is_refused(model: Any) -> None:
    cache = filled(model)
    for layer in cache.layers:
        keys, values = layer.keys[:, :, ::2].contiguous(), layer.values[:, :, ::2].contiguous()
        layer.keys, layer.values = keys, values
    with torch.no_grad():
        model(prompt(1, 4), past_key_values=cache)
    cache.crop(63)
    assert (cache.get_seq_length(), cache.get_seq_length(0)) == (63, 33)
    with pytest.raises(ValueError, match="40 positions"):
        cache.crop(40)
    cache.crop(61)
    assert cache.get_seq_length() == 61


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("to_nothing", [lambda cache: cache.crop(-100), lambda cache: cache.crop(0)])
def test_a_crop_to_nothing_after_tokens_were_picked(model: Any, to_nothing: Any, whole: bool) -> None:
    """Whose positions are not known any more need not be: none of them stays."""
    cache = filled(model)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]
    twin = cache.fork()
    assert cache.get_seq_length() == 61
    if whole:
        to_nothing(cache)
    else:
        for layer in cache.layers:
            to_nothing(layer)
    if cropped_length(61, 0) and cache.get_seq_length():
        # Zero removes nothing in this release.
        assert cache.get_seq_length() in (31, 61)
        return
    assert [cache.get_seq_length(), *(layer.get_seq_length() for layer in cache.layers)] == [0] * 4
    with torch.no_grad():
        logits = model(prompt(2), past_key_values=cache).logits
        expected = model(prompt(2), past_key_values=PiKVCache.for_model(model, **OPTIONS)).logits
    assert torch.equal(logits, expected)
    assert twin.get_seq_length() == 61
