"""Attention weights, which PiKV's attention does not form: refused where a model had them to give, before all else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache, attach, detach

IDS = torch.randint(2, 198, (2, 9), generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, Any] = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 3}


def asked_by_config(model: Any, cache: Any) -> Any:
    model.config._output_attentions = True
    try:
        return model(IDS, past_key_values=cache).attentions
    finally:
        model.config._output_attentions = False


ASK: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda model, cache: model(IDS, past_key_values=cache, output_attentions=True).attentions,
    "inner model": lambda model, cache: model.model(IDS, past_key_values=cache, output_attentions=True).attentions,
    "generate": lambda model, cache: model.generate(IDS, past_key_values=cache, do_sample=False, **OPTIONS).attentions,
    "config": asked_by_config,
}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama"])
@pytest.mark.parametrize("ask", ASK)
@torch.no_grad()
def test_refused_where_the_model_had_them_to_give(name: str, ask: str) -> None:
    model = FAMILIES[name].build()
    model.set_attn_implementation("eager")
    expected = ASK[ask](model, DynamicCache(config=model.config))
    assert len(expected) == 3
    cache = PiKVCache.for_model(model, placement="hash")
    model(IDS[:, :4], past_key_values=cache)
    for given in (cache, DynamicCache(config=model.config), None):
        with pytest.raises(NotImplementedError, match=r"output_attentions=True.*'eager'.*detach\(model\)"):
            ASK[ask](model, given)
    assert {cache.get_seq_length(layer) for layer in range(3)} == {4}
    model(IDS[:, 4:], past_key_values=cache, output_attentions=False)
    detach(model)
    for made in (DynamicCache(config=model.config), PiKVCache(model.config)):
        for ours, theirs in zip(ASK[ask](model, made), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("ask", ["forward", "generate"])
@torch.no_grad()
def test_warned_of_where_the_model_had_none(ask: str) -> None:
    model = FAMILIES["mixtral"].build()
    expected = ASK[ask](model, DynamicCache(config=model.config))
    cache = PiKVCache.for_model(model)
    with pytest.warns(UserWarning, match="gives no attention weights.*'sdpa'"):
        assert ASK[ask](model, cache) == expected


@torch.no_grad()
def test_nothing_is_said_while_the_model_uses_its_own_attention() -> None:
    model = FAMILIES["mixtral"].build()
    attach(model)
    model.set_attn_implementation("eager")
    assert len(ASK["forward"](model, PiKVCache(model.config))) == 3
