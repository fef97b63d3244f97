"""A call that is refused changes no layer, also where sliding layers come before the paged one that would refuse it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}


class Turns:
    """A prompt whose first row may be padded, and the call after it."""

    def __init__(self, length: int, padding: int) -> None:
        self.ids = prompts(2, length)["input_ids"].clamp_min(2)
        self.mask = torch.ones_like(self.ids)
        self.mask[0, :padding] = 0
        self.padded = bool(padding)

    def first(self) -> dict[str, torch.Tensor]:
        """Return the prompt."""
        return {"input_ids": self.ids, **({"attention_mask": self.mask} if self.padded else {})}

    def second(self, tokens: int = 3, shown: bool = False) -> dict[str, torch.Tensor]:
        """Return some tokens more, with a mask that goes on to hide the padding, or shows it."""
        mask = torch.nn.functional.pad(self.mask, (0, tokens), value=1)
        given = {"input_ids": prompts(2, tokens, seed=3)["input_ids"].clamp_min(2)}
        return given | ({"attention_mask": torch.ones_like(mask) if shown else mask} if self.padded else {})


def unknown_argument(model: Any, cache: Any, turns: Turns) -> None:
    model(**turns.second(), **cache_argument(cache), foo=1)


def not_causal(model: Any, cache: Any, turns: Turns) -> None:
    model(**turns.second(), **cache_argument(cache), is_causal=False)


def padding_shown(model: Any, cache: Any, turns: Turns) -> None:
    model(**turns.second(shown=True), **cache_argument(cache))


def no_mask(model: Any, cache: Any, turns: Turns) -> None:
    model(turns.second(1)["input_ids"], **cache_argument(cache))


def copied_model(model: Any, cache: Any, turns: Turns) -> None:
    copy.deepcopy(model)(**turns.second(), **cache_argument(cache))


def other_model(model: Any, cache: Any, turns: Turns) -> None:
    other = copy.deepcopy(model)
    PiKVCache.for_model(other)
    other(**turns.second(), **cache_argument(cache))


def tokens_by_hand(model: Any, cache: Any, turns: Turns) -> None:
    for index, layer in enumerate(cache.layers):
        heads, dim = layer.keys.shape[1], layer.keys.shape[3]
        cache.update(torch.ones(2, heads, 1, dim), torch.ones(2, heads, 1, dim), index)


def dropout(model: Any, cache: Any, turns: Turns) -> None:
    for layer in model.model.layers:
        layer.self_attn.train().attention_dropout = 0.1
    try:
        model(**turns.second(), **cache_argument(cache))
    finally:
        model.eval()


def positions(cache: Any) -> list[int]:
    return [cache.get_seq_length(), *(cache.get_seq_length(index) for index in range(len(cache.layers)))]


HYBRIDS = ("gpt_oss", "llama4")
OF_PADDED = (padding_shown, no_mask, copied_model, tokens_by_hand)
REFUSALS = [
    # Beside hybrids a model all of whose layers are paged, and where nothing depends on pages one with none.
    *((family, unknown_argument, 0) for family in (*HYBRIDS, "mixtral", "mixtral_sliding")),
    *((family, refused, 0) for refused in (not_causal, other_model, dropout) for family in (*HYBRIDS, "mixtral")),
    *((family, refused, 3) for refused in OF_PADDED for family in (*HYBRIDS, "mixtral")),
    ("gpt_oss", unknown_argument, 3),
]


@pytest.mark.parametrize("length", [8, 40])
@pytest.mark.parametrize(("family", "refused", "padding"), REFUSALS)
@torch.no_grad()
def test_a_refused_call_changes_no_layer(
    family: str, refused: Callable[[Any, Any, Turns], None], padding: int, length: int
) -> None:
    """Windows that are full could not give anything back either."""
    model, turns = FAMILIES[family].build(), Turns(length, padding)
    reference = DynamicCache(config=model.config)
    model(**turns.first(), **cache_argument(reference))
    expected = model(**turns.second(), **cache_argument(reference)).logits
    cache = PiKVCache.for_model(model, **SMALL)
    model(**turns.first(), **cache_argument(cache))
    before = positions(cache)
    for _ in range(2):
        with pytest.raises((ValueError, NotImplementedError)):
            refused(model, cache, turns)
        assert positions(cache) == before
    logits = model(**turns.second(), **cache_argument(cache)).logits
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", [*HYBRIDS, "mixtral"])
@pytest.mark.parametrize("way", ["eager", "copy", "detached"])
@torch.no_grad()
def test_attention_that_cannot_pass_over_evicted_tokens(family: str, way: str) -> None:
    """They were evicted from the last layer, whose turn comes when the others have got the call's tokens."""
    model, turns = FAMILIES[family].build(), Turns(40, 0)
    cache = PiKVCache.for_model(model, **SMALL)
    model(**turns.first(), **cache_argument(cache))
    layer = next(layer for layer in reversed(cache.layers) if hasattr(layer, "keep"))
    kept = torch.ones_like(layer.stored_mask())
    kept[:, :, 5] = False
    layer.keep(kept)
    expected = model(**turns.second(), **cache_argument(cache.fork())).logits
    before, other = positions(cache), copy.deepcopy(model)
    if way == "eager":
        model.set_attn_implementation("eager")
    if way == "detached":
        detach(model)
    with pytest.raises(RuntimeError, match="tokens were evicted"):
        (other if way == "copy" else model)(**turns.second(), **cache_argument(cache))
    assert positions(cache) == before
    PiKVCache.for_model(model)
    model.set_attn_implementation("pikv")
    assert torch.equal(model(**turns.second(), **cache_argument(cache)).logits, expected)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("failing", ["attention", "projection", "mlp"])
@pytest.mark.parametrize("family", ["mixtral", "llama", "gpt_oss"])
@torch.no_grad()
def test_what_comes_after_a_call_that_failed(family: str, failing: str, error: type[BaseException]) -> None:
    """Nothing of a call outlives it: who is not the model's attention gets all K/V, whatever failed before.

    The first layer fails, so that all layers of the cache are as long as they were, or one of them is cut back.
    """
    model, turns = FAMILIES[family].build(), Turns(12, 0)
    reference = DynamicCache(config=model.config)
    model(**turns.first(), **cache_argument(reference))
    placement = "hash" if family == "llama" else "expert"
    cache = PiKVCache.for_model(model, **SMALL, placement=placement)
    model(**turns.first(), **cache_argument(cache))
    first = model.model.layers[0]
    module = {"attention": first.self_attn, "projection": first.self_attn.q_proj, "mlp": first.mlp}[failing]

    def fail(*_: Any) -> None:
        raise error

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(**turns.second(1), **cache_argument(cache))
    hook.remove()
    cache.crop(12)
    # Where it had got so far, the call has left tokens that attention has read.
    new = torch.ones(2, 2, 1, 16)
    for index in range(len(cache.layers)):
        assert cache.fork().update(new, new, index)[0].shape[2] == reference.layers[index].keys.shape[2] + 1
        assert cache.fork().layers[index].update(new, new)[0].shape[2] == reference.layers[index].keys.shape[2] + 1
    other = copy.deepcopy(model)
    expected = model(**turns.second(1), **cache_argument(reference)).logits
    for each, given in ((other, cache.fork()), (model, cache)):
        assert (each(**turns.second(1), **cache_argument(given)).logits - expected).abs().max() <= 1e-4


def test_a_cache_that_is_not_to_be_used() -> None:
    """A cache beside `use_cache=False`: `generate` gives it the whole sequence in every step."""
    model, turns = FAMILIES["mixtral"].build(), Turns(12, 3)
    cache = PiKVCache.for_model(model, **SMALL)
    with pytest.raises(ValueError, match="a cache and use_cache=False"):
        model.generate(**turns.first(), **cache_argument(cache), use_cache=False, max_new_tokens=3)
