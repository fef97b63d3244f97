"""The real model and what is made of it; skipped where it has not been fetched: `make test-real` fetches it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf import PiKVCache
from pikv_hf.eval.real_model.fit_router import ffn_inputs, loads
from pikv_hf.eval.real_model.load import is_fetched, load_real_model
from pikv_hf.eval.real_model.upcycle import CHOSEN, EXPERTS
from pikv_hf.eval.tasks.ruler import Haystack

pytestmark = pytest.mark.skipif(not is_fetched(), reason="the real model has not been fetched: make test-real does")

QUESTION = "What is the capital of France? And of Italy?"


@pytest.fixture(scope="module")
def dense():
    return load_real_model("smollm2")


@pytest.fixture(scope="module")
def moe():
    return load_real_model("smollm2-moe")[0]


def asked(tokenizer):
    message = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_it_answers(dense) -> None:
    model, tokenizer = dense
    inputs = asked(tokenizer)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    answer = tokenizer.decode(output[0, inputs.input_ids.shape[1] :])
    assert "Paris" in answer
    assert "Rome" in answer
    assert answer.endswith("<|im_end|>")


# Its vocabulary lacks a few bytes: of control characters, and of planes beyond the third.
@given(text=st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=("Cs", "Cc")), max_size=60))
def test_text_comes_back(dense, text: str) -> None:
    tokenizer = dense[1]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_upcycled_model_has_the_same_logits(dense, moe) -> None:
    model, tokenizer = dense
    ids = tokenizer(Haystack.bundled().text[:4000], return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


def test_a_cache_of_its_experts_writes_the_same(dense, moe) -> None:
    model, tokenizer = dense
    inputs = asked(tokenizer)
    cache = PiKVCache.for_model(moe, recent_window=0, sink_tokens=0, page_size=8)
    given = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(moe.generate(**inputs, past_key_values=cache, **given), model.generate(**inputs, **given))


def test_experts_are_even_on_text_that_they_were_not_fitted_to(dense, moe) -> None:
    model, tokenizer = dense
    # The essays have 16,000 tokens; routers were fitted to the first half.
    ids = tokenizer(Haystack.bundled().text, return_tensors="pt", verbose=False).input_ids[:, -1500:]
    inputs = ffn_inputs(model, [ids])
    shares = torch.stack(
        [loads(given, layer.mlp.gate.weight, CHOSEN) for given, layer in zip(inputs, moe.model.layers, strict=True)]
    )
    entropy = -(shares * shares.clamp(min=1e-9).log2()).sum(1) / torch.tensor(EXPERTS).log2()
    assert entropy.min() > 0.9
