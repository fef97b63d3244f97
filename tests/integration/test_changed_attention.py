"""What others do between the cache and attention, from the start or later: right, or refused with nothing changed."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache
from transformers.models.mixtral import modeling_mixtral

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_of_call

SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 4}
Make = Callable[[Any], Any]
Change = Callable[[Any, Any], None]


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 198, (2, count), generator=torch.Generator().manual_seed(seed))


# Attention that is replaced


def own_attention(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    """Attend without transformers' interface, to twice the values."""
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    q, k, v = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
    q, k = modeling_mixtral.apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
    k, v = cache_of_call(kwargs).update(k, v, self.layer_idx)
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    k, v = (modeling_mixtral.repeat_kv(each, 2) for each in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, 2 * v, causal, scale=self.scaling)
    return self.o_proj(out.transpose(1, 2).flatten(2)), None


def method_of_each(model: Any, cache: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(own_attention, layer.self_attn)


def method_of_one(model: Any, cache: Any) -> None:
    model.model.layers[1].self_attn.forward = types.MethodType(own_attention, model.model.layers[1].self_attn)


def method_of_class(model: Any, cache: Any) -> None:
    """Replaced in a class of this model alone, for other tests not to see it."""
    for layer in model.model.layers:
        layer.self_attn.__class__.forward = own_attention


def function_of_each(model: Any, cache: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(own_attention, layer.self_attn)


def wrapper_of_each(model: Any, cache: Any) -> None:
    """What changes nothing, and does not say what it wraps."""
    for layer in model.model.layers:
        forward = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, forward=forward, **kwargs: forward(*args, **kwargs)


# What `update` returns


def on_update(change: Callable[[Any, Any], Any]) -> Change:
    def apply(model: Any, cache: Any) -> None:
        update = cache.update
        cache.update = lambda *args, **kwargs: change(*update(*args, **kwargs))

    return apply


UPDATES: dict[str, Change] = {
    "keys": on_update(lambda keys, values: (keys * 1.5, values)),
    "values": on_update(lambda keys, values: (keys, values * 1.5)),
    "both": on_update(lambda keys, values: (keys * 1.5, values * 1.5)),
    "copies": on_update(lambda keys, values: (keys.clone(), values.clone())),
    "copied values": on_update(lambda keys, values: (keys, values.clone())),
}
FORWARDS: dict[str, Change] = {
    change.__name__: change
    for change in (method_of_each, method_of_one, method_of_class, function_of_each, wrapper_of_each)
}
#: Each begins with a prompt.
CALLS = {"steps": (1, 1, 1), "chunks": (3, 1, 4)}


def build() -> Any:
    model = FAMILIES["mixtral"].build()
    kind = type(
        "OfThisModel", (modeling_mixtral.MixtralAttention,), {"forward": modeling_mixtral.MixtralAttention.forward}
    )
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model


@torch.no_grad()
def run(
    make: Callable[[Any], Any], change: Change, when: str, calls: tuple[int, ...], again: bool
) -> list[torch.Tensor]:
    model = build()
    cache = make(model)
    if when == "before the prompt":
        change(model, cache)
    model(tokens(9, 1), past_key_values=cache)
    if when == "in a fork":
        cache = cache.fork() if isinstance(cache, PiKVCache) else cache
    if when != "before the prompt":
        change(model, cache)
    logits = []
    for number, count in enumerate(calls):
        given = tokens(count, number)
        if again and not number:
            lengths = [cache.get_seq_length(layer) for layer in range(3)]
            with pytest.raises(ValueError, match="layer 0: attention goes on without the history"):
                model(given, past_key_values=cache)
            assert [cache.get_seq_length(layer) for layer in range(3)] == lengths
        logits.append(model(given, past_key_values=cache).logits)
    return logits


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("when", ["before the prompt", "after it", "in a fork"])
@pytest.mark.parametrize("name", [*UPDATES, *FORWARDS])
def test_as_dynamic_cache(name: str, when: str, calls: str) -> None:
    change = (UPDATES | FORWARDS)[name]
    expected = run(lambda model: DynamicCache(config=model.config), change, when, CALLS[calls], again=False)
    # Nothing tells beforehand what is about to be done to K/V: the first call finds out, and is refused.
    again = name in UPDATES and when != "before the prompt"
    found = run(lambda model: PiKVCache.for_model(model, **SMALL), change, when, CALLS[calls], again)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize("change", [wrapper_of_each, lambda model, cache: None])
@torch.no_grad()
def test_what_changes_nothing_is_read_in_place_again(change: Change) -> None:
    model = build()
    cache = PiKVCache.for_model(model, **SMALL)
    model(tokens(9, 1), past_key_values=cache)
    change(model, cache)
    model(tokens(1, 2), past_key_values=cache)
    assert not cache.stats().dense_layers


@pytest.mark.parametrize("name", ["method_of_each", "values"])
@torch.no_grad()
def test_refused_where_tokens_were_evicted(name: str) -> None:
    model = build()
    cache = PiKVCache.for_model(model, **SMALL)
    model(tokens(9, 1), past_key_values=cache)
    for layer in cache.layers:
        kept = torch.ones(2, 2, 9, dtype=torch.bool)
        kept[:, :, 5] = False
        layer.keep(kept)
    (UPDATES | FORWARDS)[name](model, cache)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be given all K/V, since tokens were evicted"):
            model(tokens(1, 2), past_key_values=cache)
        assert [cache.get_seq_length(layer) for layer in range(3)] == [9] * 3
