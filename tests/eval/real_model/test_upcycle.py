"""A dense llama and the Mixtral made of it compute the same; its routers are even."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from pikv_hf import PiKVCache
from pikv_hf.eval.real_model.fit_router import ffn_inputs, fit_router, loads
from pikv_hf.eval.real_model.upcycle import CHOSEN, EXPERTS, upcycle

LAYERS, HIDDEN = 3, 48


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=HIDDEN,
        intermediate_size=80,
        num_hidden_layers=LAYERS,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0},
        rms_norm_eps=1e-4,
    )
    return LlamaForCausalLM(config).eval()


def random_routers(seed: int, layers: int = LAYERS) -> torch.Tensor:
    return torch.randn(layers, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 99))
def test_any_router_leaves_the_function_of_the_dense_model(dense: LlamaForCausalLM, seed: int) -> None:
    ids = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, logits = dense(ids).logits, upcycle(dense, random_routers(seed))(ids).logits
    # Two weights that add up to one round once more per layer than none.
    tolerance = 16 * LAYERS * torch.finfo(torch.float32).eps * expected.abs().max()
    torch.testing.assert_close(logits, expected, rtol=0, atol=float(tolerance))


def test_experts_are_views_of_one_and_the_embedding_stays_tied(dense: LlamaForCausalLM) -> None:
    model = upcycle(dense, random_routers(0))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert parameter.stride(0) == 0
            assert parameter.untyped_storage().nbytes() < 2 * parameter[0].nbytes
    assert model.lm_head.weight.data_ptr() == dense.model.embed_tokens.weight.data_ptr()
    assert model.config.num_experts_per_tok == CHOSEN


def test_a_cache_of_experts_generates_the_same(dense: LlamaForCausalLM) -> None:
    model, ids = upcycle(dense, random_routers(1)), torch.arange(60)[None]
    cache = PiKVCache.for_model(model, num_shards=4, page_size=8, recent_window=8, sink_tokens=2)
    got = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(got, dense.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0))


def test_a_router_for_each_layer(dense: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="3 layers needs as many routers, got 2"):
        upcycle(dense, random_routers(0, layers=2))


def test_inputs_are_what_the_ffn_is_given(dense: LlamaForCausalLM) -> None:
    prompts = [torch.arange(5)[None], torch.arange(40, 43)[None]]
    inputs = ffn_inputs(dense, prompts)
    assert inputs.shape == (LAYERS, 8, HIDDEN)
    hidden = dense.model.embed_tokens(prompts[1])
    positions = torch.arange(3)[None]
    layer = dense.model.layers[0]
    with torch.no_grad():
        attended = layer.self_attn(
            layer.input_layernorm(hidden), dense.model.rotary_emb(hidden, positions), attention_mask=None
        )[0]
        expected = layer.post_attention_layernorm(hidden + attended)[0]
    torch.testing.assert_close(inputs[0, 5:], expected)


def test_routers_are_even_and_tell_kinds_apart() -> None:
    generator = torch.Generator().manual_seed(3)
    kinds = torch.randn(4, HIDDEN, generator=generator) * 2
    kind = torch.arange(4).repeat_interleave(torch.tensor([900, 300, 150, 50]))
    inputs = kinds[kind] + torch.randn(len(kind), HIDDEN, generator=generator) + 1
    weight = fit_router(inputs, EXPERTS, CHOSEN)
    assert torch.equal(weight, fit_router(inputs, EXPERTS, CHOSEN))
    share = loads(inputs, weight, CHOSEN)
    assert share.min() > 0.8 / EXPERTS
    assert share.max() < 1.2 / EXPERTS
    # An expert that had the kinds in their shares would know 900 of 1,400 at best.
    first = (inputs @ weight.T).argmax(1)
    table = torch.zeros(EXPERTS, 4).index_put_((first, kind), torch.ones(()), accumulate=True)
    assert table.max(1).values.sum() / len(kind) > 0.85
