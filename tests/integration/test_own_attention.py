"""Attention functions that users have registered: what computes something else than transformers' own is left alone."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from placed_hooks import hooks_of
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pikv_hf import PiKVCache, attach, detach

Registered = tuple[dict[str, Any], dict[str, Any]]


def doubled(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Attend to twice the values."""
    return sdpa_attention_forward(module, query, key, 2 * value, *args, **kwargs)


def unmasked(*args: Any, **kwargs: Any) -> Any:
    return sdpa_mask(*args, **{**kwargs, "attention_mask": None})


def wrapped_as_kvpress_does(function: Any) -> Any:
    patch = pytest.importorskip("kvpress.attention_patch").attention_patch
    return patch(function)


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    # Where kvpress was imported it has put its own before these.
    for registered in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        monkeypatch.setattr(registered, "_local_mapping", {})


def ids(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 198, (batch, count), generator=torch.Generator().manual_seed(seed))


#: What may be registered under a name: the attention and the mask.
OTHERS = {
    "attention": ("mine", lambda: doubled, sdpa_mask),
    "attention under transformers' name": ("sdpa", lambda: doubled, sdpa_mask),
    "attention under the name of the model's code": ("eager", lambda: doubled, sdpa_mask),
    "attention that kvpress has wrapped": ("mine", lambda: wrapped_as_kvpress_does(doubled), sdpa_mask),
    "masks": ("sdpa", lambda: sdpa_attention_forward, unmasked),
}


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("kind", OTHERS)
def test_what_computes_something_else_is_not_replaced(kind: str) -> None:
    name, make, mask = OTHERS[kind]
    AttentionInterface.register(name, make())
    AttentionMaskInterface.register(name, mask)
    model = FAMILIES["mixtral"].build()
    model.set_attn_implementation(name)
    for attaching in (attach, PiKVCache.for_model):
        with pytest.raises(ValueError, match=rf"attn_implementation='{name}'.*test_own_attention"):
            attaching(model)
    assert model.config._attn_implementation == name
    assert hooks_of(model) == 0
    with torch.no_grad():
        expected = model(ids(2, 9), past_key_values=DynamicCache(config=model.config)).logits
        assert torch.equal(model(ids(2, 9), past_key_values=PiKVCache(model.config)).logits, expected)


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize(
    "make", [lambda: sdpa_attention_forward, lambda: wrapped_as_kvpress_does(sdpa_attention_forward)]
)
def test_transformers_own_under_another_name_is_replaced(make: Any) -> None:
    AttentionInterface.register("alias", make())
    AttentionMaskInterface.register("alias", sdpa_mask)
    model = FAMILIES["mixtral"].build()
    model.set_attn_implementation("alias")
    with attach(model):
        assert model.config._attn_implementation == "pikv"
    assert model.config._attn_implementation == "alias"


@pytest.mark.usefixtures("_restored")
def test_what_is_chosen_after_attaching_stays_and_is_not_replaced_by_attaching_again() -> None:
    AttentionInterface.register("mine", doubled)
    AttentionMaskInterface.register("mine", sdpa_mask)
    model = FAMILIES["mixtral"].build()
    logits = []
    for make in (lambda: DynamicCache(config=model.config), lambda: PiKVCache.for_model(model, page_size=4)):
        cache = make()
        with torch.no_grad():
            model(ids(2, 9), past_key_values=cache)
            model.set_attn_implementation("mine")
            logits.append([model(ids(2, count, 1), past_key_values=cache).logits for count in (3, 1, 1)])
        if isinstance(cache, PiKVCache):
            with pytest.raises(ValueError, match="'mine'"):
                attach(model)
            assert model.config._attn_implementation == "mine"
        model.set_attn_implementation("sdpa")
    for ours, theirs in zip(logits[1], logits[0], strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
    detach(model)
    assert model.config._attn_implementation == "sdpa"
