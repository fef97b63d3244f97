"""Layers whose keys did not reach PiKV's attention give it dense K/V, find back by themselves, and say so."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.layer.layer import PiKVLayer

SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 8, "sink_tokens": 2, "num_shards": 3, "placement": "hash"}


class Interrupted(BaseException):
    """As Ctrl-C: nothing of the call is tidied up."""


@contextmanager
def interrupted(at: int) -> Iterator[None]:
    """Interrupt the model between the update of a layer and its attention."""
    update = PiKVLayer.update

    def stop(layer: PiKVLayer, *args: Any, **kwargs: Any) -> Any:
        result = update(layer, *args, **kwargs)
        if layer.layer_idx == at:
            raise Interrupted
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PiKVLayer, "update", stop)
        yield


def ids(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB - 1, (2, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("prompt", [0, 20])
@pytest.mark.parametrize("new", [1, 9])
def test_a_layer_finds_back_after_an_interrupted_call(at: int, prompt: int, new: int) -> None:
    model = FAMILIES["olmoe"].build()
    mine, theirs = PiKVCache.for_model(model, **SMALL), DynamicCache(config=model.config)
    for cache in (mine, theirs) if prompt else ():
        model(ids(prompt), past_key_values=cache)
    with interrupted(at), pytest.raises(Interrupted):
        model(ids(new, seed=1), past_key_values=mine)
    for layer in mine.layers:
        layer.crop(prompt) if prompt else layer.truncate(0)
    for step, tokens in enumerate((9, 1, 3)):
        ours, other = (model(ids(tokens, seed=step), past_key_values=cache).logits for cache in (mine, theirs))
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
        assert mine.stats().dense_layers == {}


@torch.no_grad()
def test_stats_say_which_layers_are_read_densely_and_why() -> None:
    model = FAMILIES["olmoe"].build()
    cache = PiKVCache.for_model(model, **SMALL)
    model(ids(9), past_key_values=cache)
    assert cache.stats().dense_layers == {}
    assert "densely" not in str(cache.stats())
    model.set_attn_implementation("eager")
    assert cache.stats().dense_layers == dict.fromkeys(range(3), "the model's attention is 'eager'")
    assert "0, 1, 2  the model's attention is 'eager'" in str(cache.stats())
    detach(model)
    alone = PiKVCache(model.config)
    model(ids(9), past_key_values=alone)
    assert set(alone.stats().dense_layers.values()) == {"the cache was made from a config alone"}


@torch.no_grad()
def test_a_model_that_will_be_read_densely_warns_once() -> None:
    model = FAMILIES["jetmoe"].build()
    with pytest.warns(UserWarning, match="JetMoeAttention changes keys between the cache and attention: 3 of 3 layers"):
        cache = PiKVCache.for_model(model, **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PiKVCache.for_model(model, **SMALL)
    model(ids(9), past_key_values=cache)
    model(ids(1), past_key_values=cache)
    assert set(cache.stats().dense_layers) == {0, 1, 2}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "jetmoe"])
def test_other_models_do_not_warn(family: str) -> None:
    model = FAMILIES[family].build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PiKVCache.for_model(model, **SMALL)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.* changes keys between the cache and attention")
@pytest.mark.parametrize("came", ["from another cache", "while detached"])
@pytest.mark.parametrize("family", ["jetmoe", "olmoe"])
def test_keys_that_attention_does_not_get_are_not_missed_in_the_first_call_that_is_attached(
    family: str, came: str
) -> None:
    """JetMoE copies the keys; whether a model does, no call has told yet."""
    model = FAMILIES[family].build()
    theirs = DynamicCache(config=model.config)
    model(ids(20), past_key_values=theirs)
    if came == "from another cache":
        mine = PiKVCache.from_cache(model, theirs, **SMALL)
    else:
        mine = PiKVCache.for_model(model, **SMALL)
        detach(model)
        model(ids(20), past_key_values=mine)
        PiKVCache.for_model(model, **SMALL)
    for step, tokens in enumerate((1, 3, 1)):
        ours, other = (model(ids(tokens, seed=step), past_key_values=cache).logits for cache in (mine, theirs))
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
    assert len(mine.stats().dense_layers) == (3 if family == "jetmoe" else 0)


@torch.no_grad()
def test_a_detached_model_is_refused_padded_rows_before_its_sliding_layers_have_changed() -> None:
    model = FAMILIES["gpt_oss"].build()
    mine, theirs = PiKVCache.for_model(model, **SMALL), DynamicCache(config=model.config)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, :3] = 0
    for cache in (mine, theirs):
        model(ids(12), attention_mask=mask[:, :12], past_key_values=cache)
    detach(model)
    with pytest.raises(ValueError, match="only an attached model's attention"):
        model(ids(2, seed=1), attention_mask=mask, past_key_values=mine)
    assert [layer.get_seq_length() for layer in mine.layers] == [12, 12, 12]
    PiKVCache.for_model(model, **SMALL)
    ours, other = (model(ids(2, seed=1), attention_mask=mask, past_key_values=cache).logits for cache in (mine, theirs))
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("family", ["llama4", "gpt_oss", "mixtral_sliding", "olmoe"])
def test_crop_takes_an_interrupted_call_back_from_the_layers_that_it_reached(family: str, at: int) -> None:
    """Some layers have its tokens, sliding or paged, and others have not."""
    model = FAMILIES[family].build()
    placement = {**SMALL, "placement": "hash"}
    mine, theirs = PiKVCache.for_model(model, **placement), DynamicCache(config=model.config)
    for cache in (mine, theirs):
        model(ids(6), past_key_values=cache)
    stopped = model.model.layers[at].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        model(ids(3, seed=1), past_key_values=mine)
    stopped.remove()
    mine.crop(6)
    assert [layer.get_seq_length() for layer in mine.layers] == [6] * len(mine.layers)
    ours, other = (model(ids(2, seed=2), past_key_values=cache).logits for cache in (mine, theirs))
    torch.testing.assert_close(ours, other, atol=1e-4, rtol=0)
