"""Gradients through a call on a filled cache are DynamicCache's; what is stored is a constant."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM, FakeAttachment
from families import EVERY_FAMILY, FAMILIES, prompts
from padded_masks import only_padding
from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig, detach
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.layer.input_checks import warn_detached
from pikv_hf.layer.layer import PiKVLayer

SMALL = {"page_size": 8, "recent_window": 16, "num_shards": 3}
PROMPT, NEW = 40, 5


@pytest.fixture(autouse=True)
def _no_warning_elsewhere() -> Iterator[None]:
    warn_detached.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A PiKVCache stores tokens detached")
        yield


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, FAMILIES[request.param].build()


@pytest.fixture(scope="module")
def qwen() -> Any:
    return FAMILIES["qwen3_moe"].build()


Gradients = dict[str, torch.Tensor]


def frozen_prefix(model: Any, cache: Any) -> tuple[torch.Tensor, Gradients]:
    """Return the logits of several tokens after a prefix without gradients, and the gradients that they lead to."""
    given = prompts(2, PROMPT + NEW, seed=3)
    ids, mask = given["input_ids"], given["attention_mask"]
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        model(input_ids=ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], past_key_values=cache)
    soft = model.get_input_embeddings()(ids[:, PROMPT:]).detach().requires_grad_()
    logits = model(inputs_embeds=soft, attention_mask=mask, past_key_values=cache).logits
    logits.logsumexp(dim=-1).sum().backward()
    assert soft.grad is not None
    of_parameters = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return logits.detach(), {"soft prompt": soft.grad, **of_parameters}


def oracle(name: str, model: Any) -> None:
    """Have a model attend by itself, in the one implementation that does all that its family asks for."""
    detach(model)
    model.set_attn_implementation("eager" if name == "gpt_oss" else "sdpa")


def assert_close(ours: tuple[torch.Tensor, Gradients], theirs: tuple[torch.Tensor, Gradients]) -> None:
    assert (ours[0] - theirs[0]).abs().max() <= 1e-4
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        # Sums over thousands of terms in float32: relative to the largest of them.
        assert (ours[1][name] - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1.0), name


def test_every_family_behind_a_frozen_prefix(family: tuple[str, Any]) -> None:
    name, model = family
    oracle(name, model)
    expected = frozen_prefix(model, DynamicCache(config=model.config))
    assert expected[1]["soft prompt"].abs().max() > 1e-2
    assert_close(frozen_prefix(model, PiKVCache(model.config, PiKVConfig(**SMALL))), expected)
    placement = "expert" if FAMILIES[name].routed else "hash"
    for layers in ("bounded", "paged") if FAMILIES[name].sliding else ("paged",):
        options = {**SMALL, "placement": placement, "sliding_layers": layers}
        assert_close(frozen_prefix(model, PiKVCache.for_model(model, **options)), expected)


def formula(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return attention in float64, `(B, Q, Hq, Dv)`; `visible` is `(B, H, Q, T)`."""
    heads = query.shape[1]
    keys, values, visible = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (keys, values, visible))
    logits = query.double() @ keys.double().transpose(2, 3) * SCALE
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    shares = logits.exp() * visible
    total = shares.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp().view(1, -1, 1, 1)
    return (shares / total @ values.double()).transpose(1, 2)


@pytest.mark.parametrize("options", [{}, {"key_codec": "int8", "value_codec": "int4"}], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("new", [1, 3])
def test_gradients_of_attention_are_those_of_its_formula(
    options: dict[str, Any], softcap: float | None, sinks: bool, new: int
) -> None:
    """Over what is left of a prompt that was padded, packed, and evicted head by head."""
    torch.manual_seed(0)
    layer = PiKVLayer(0, PiKVConfig(page_size=4, recent_window=8, num_shards=2, **options), FakeAttachment())
    kept = torch.rand(2, HEADS, 32) < 0.7
    shown = torch.ones(2, 32 + new, dtype=torch.bool)
    shown[0, :5] = False
    with torch.no_grad():
        padded = shown[:, None, None, :32] & torch.ones(32, 32, dtype=torch.bool).tril()
        only_padding(padded, shown[:, :32])
        given = torch.randn(2, HEADS, 32, KEY_DIM), torch.randn(2, HEADS, 32, VALUE_DIM)
        pikv_attention_forward(ATTENTION, torch.randn(2, HEADS * GROUPS, 32, KEY_DIM), *layer.update(*given), padded)
        layer.record_experts(torch.randint(0, EXPERTS, (64,)))
        layer.keep(kept)
    query = torch.randn(2, HEADS * GROUPS, new, KEY_DIM, requires_grad=True)
    key, value = torch.randn(2, HEADS, new, KEY_DIM), torch.randn(2, HEADS, new, VALUE_DIM)
    sink = torch.randn(HEADS * GROUPS, requires_grad=True) if sinks else None
    wanted = [query, key.requires_grad_(), value.requires_grad_(), *([] if sink is None else [sink])]
    mask = shown[:, None, None] & torch.ones(new, 32 + new, dtype=torch.bool).tril(32)
    past = layer.dense()
    out, _ = pikv_attention_forward(
        ATTENTION, query, *layer.update(key, value), mask, scaling=SCALE, softcap=softcap, s_aux=sink
    )
    keys, values = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
    visible = mask & layer.stored_mask()[:, :, None]
    expected = formula(query, keys, values, visible, softcap, sink)
    assert (out - expected).abs().max() <= 1e-5
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), wanted)
    theirs = torch.autograd.grad((expected * weights).sum(), wanted)
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [{"routing": "page_bound", "max_pages": 2}, {"budget": 40}, {"key_codec": "int4"}])
def test_values_are_those_of_a_call_without_gradients(qwen: Any, options: dict[str, Any]) -> None:
    ids = prompts(1, PROMPT + NEW)["input_ids"]
    cache = PiKVCache.for_model(qwen, **SMALL, **options)
    with torch.no_grad():
        qwen(input_ids=ids[:, :PROMPT], past_key_values=cache)
        fork = cache.fork()
        expected = [qwen(input_ids=ids[:, i : i + 1], past_key_values=fork).logits for i in range(PROMPT, PROMPT + NEW)]
    for index, logits in enumerate(expected, start=PROMPT):
        ours = qwen(input_ids=ids[:, index : index + 1], past_key_values=cache).logits
        assert ours.requires_grad
        assert (ours - logits).abs().max() <= 1e-5
    assert str(cache.stats()) == str(fork.stats())


def test_soft_prompt_learns(qwen: Any) -> None:
    """Trained on one prefix, to which each step crops back; DynamicCache's crop would keep the step's graph."""
    ids = prompts(1, PROMPT)["input_ids"]
    losses = {}
    for name in ("dynamic", "pikv"):
        detach(qwen)
        torch.manual_seed(0)
        soft = (torch.randn(1, 4, 64) * 0.1).requires_grad_()
        optimizer = torch.optim.Adam([soft], lr=0.05)
        prefix = PiKVCache.for_model(qwen, **SMALL) if name == "pikv" else DynamicCache(config=qwen.config)
        with torch.no_grad():
            qwen(input_ids=ids, past_key_values=prefix)
        losses[name] = []
        for _ in range(6):
            optimizer.zero_grad()
            cache = prefix if name == "pikv" else copy.deepcopy(prefix)
            loss = -qwen(inputs_embeds=soft, past_key_values=cache).logits[:, -1].log_softmax(-1)[:, 7].mean()
            loss.backward()
            optimizer.step()
            if name == "pikv":
                cache.crop(PROMPT)
            losses[name].append(loss.item())
    assert losses["pikv"][-1] < losses["pikv"][0]
    assert losses["pikv"] == pytest.approx(losses["dynamic"], abs=1e-3)


def test_stored_tokens_are_constants_and_say_so_once(qwen: Any) -> None:
    """Two calls in one graph: the second's gradients reach its own tokens, as if the first had been without any."""
    ids = prompts(1, PROMPT + NEW)["input_ids"]
    soft = qwen.get_input_embeddings()(ids).detach().requires_grad_()
    warn_detached.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = PiKVCache.for_model(qwen, **SMALL)
        first = qwen(inputs_embeds=soft[:, :PROMPT], past_key_values=cache).logits
        second = qwen(inputs_embeds=soft[:, PROMPT:], past_key_values=cache).logits
    # From 5.24 on transformers has warnings of its own.
    ours = [each for each in caught if str(each.message).startswith("A PiKVCache stores tokens detached: ")]
    assert [each.filename for each in ours] == [__file__]
    (grad,) = torch.autograd.grad(second.sum(), soft, retain_graph=True)
    assert grad[:, :PROMPT].abs().max() == 0
    assert grad[:, PROMPT:].abs().max() > 1e-2
    (both,) = torch.autograd.grad(first.sum() + second.sum(), soft, retain_graph=True)
    assert both[:, :PROMPT].abs().max() > 1e-2
    (again,) = torch.autograd.grad(first.sum() + second.sum(), soft)
    assert torch.equal(both, again)


def test_second_derivatives(qwen: Any) -> None:
    def curvature(cache: Any) -> torch.Tensor:
        ids = prompts(1, PROMPT + 3)["input_ids"]
        with torch.no_grad():
            qwen(input_ids=ids[:, :PROMPT], past_key_values=cache)
        soft = qwen.get_input_embeddings()(ids[:, PROMPT:]).detach().requires_grad_()
        out = qwen(inputs_embeds=soft, past_key_values=cache).logits.logsumexp(-1).sum()
        (grad,) = torch.autograd.grad(out, soft, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), soft)[0]

    detach(qwen)
    qwen.set_attn_implementation("eager")
    expected = curvature(DynamicCache(config=qwen.config))
    ours = curvature(PiKVCache.for_model(qwen, **SMALL))
    assert (ours - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_attached_models_train_without_a_cache(family: tuple[str, Any]) -> None:
    name, model = family
    ids = prompts(2, 20)["input_ids"]

    def gradients() -> Gradients:
        model.zero_grad(set_to_none=True)
        model.train()
        # Phi-MoE's routers draw.
        torch.manual_seed(0)
        try:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        finally:
            model.eval()
        return {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}

    oracle(name, model)
    expected = gradients()
    PiKVCache.for_model(model, placement="hash")
    ours = gradients()
    assert ours.keys() == expected.keys()
    for key, grad in expected.items():
        assert (ours[key] - grad).abs().max() <= 1e-4 * grad.abs().max().clamp_min(1e-2), key


def test_on_several_devices(qwen: Any) -> None:
    oracle("qwen3_moe", qwen)
    expected = frozen_prefix(qwen, DynamicCache(config=qwen.config))
    assert_close(frozen_prefix(qwen, PiKVCache.for_model(qwen, **SMALL, devices=["cpu:0", "cpu:1"])), expected)


@pytest.mark.parametrize("attached", [True, False])
def test_assigned_tokens_are_constants(qwen: Any, attached: bool) -> None:
    """Presses compute keys anew, with gradients enabled, of the model's parameters."""
    ids = prompts(1, PROMPT)["input_ids"]
    cache = PiKVCache.for_model(qwen, **SMALL) if attached else PiKVCache(qwen.config, PiKVConfig(**SMALL))
    qwen(input_ids=ids, past_key_values=cache)
    factor = torch.tensor(2.0, requires_grad=True)
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        layer.keys, layer.values = keys[:, :, 5:] * factor, values[:, :, 5:] * factor
        assert torch.equal(layer.keys, keys[:, :, 5:] * 2)
        assert not layer.values.requires_grad


# What is refused


@pytest.mark.parametrize("filled", [0, PROMPT])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_a_cache_is_refused(filled: int, checkpointing: bool) -> None:
    # Of its own: checkpointing leaves a hook behind, by which embeddings require gradients.
    qwen = FAMILIES["qwen3_moe"].build()
    ids = prompts(1, PROMPT + NEW)["input_ids"]
    cache = PiKVCache.for_model(qwen, **SMALL)
    with torch.no_grad():
        if filled:
            qwen(input_ids=ids[:, :filled], past_key_values=cache)
        fork = cache.fork()
        expected = qwen(input_ids=ids[:, filled:], past_key_values=fork).logits
    qwen.train()
    if checkpointing:
        qwen.gradient_checkpointing_enable()
    try:
        with pytest.raises(ValueError, match=r"training mode.*model\.eval\(\)"):
            qwen(input_ids=ids[:, filled:], past_key_values=cache)
    finally:
        qwen.eval()
    assert cache.get_seq_length() == filled
    with torch.no_grad():
        assert (qwen(input_ids=ids[:, filled:], past_key_values=cache).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("transform", ["grad", "jvp", "dual"])
def test_transforms_are_refused(qwen: Any, transform: str, attached: bool) -> None:
    ids = prompts(1, NEW)["input_ids"]
    cache = PiKVCache.for_model(qwen, **SMALL) if attached else PiKVCache(qwen.config)
    soft = qwen.get_input_embeddings()(ids).detach()

    def loss(soft: torch.Tensor) -> torch.Tensor:
        return qwen(inputs_embeds=soft, past_key_values=cache).logits.sum()

    def dual() -> None:
        with torch.autograd.forward_ad.dual_level():
            loss(torch.autograd.forward_ad.make_dual(soft, torch.ones_like(soft)))

    calls = {
        "grad": lambda: torch.func.grad(loss)(soft),
        "jvp": lambda: torch.func.jvp(loss, (soft,), (torch.ones_like(soft),)),
        "dual": dual,
    }
    with pytest.raises(ValueError, match=r"torch\.func .* use a DynamicCache there"):
        calls[transform]()
    assert cache.get_seq_length() == 0


def test_reading_needs_no_eval_mode(qwen: Any) -> None:
    """In training mode without gradients, or with frozen K/V, there is nothing that a cache could lose."""
    ids = prompts(1, PROMPT)["input_ids"]
    cache = PiKVCache.for_model(qwen, **SMALL)
    qwen.train()
    try:
        with torch.no_grad():
            qwen(input_ids=ids[:, :30], past_key_values=cache)
        qwen.requires_grad_(False)
        qwen(input_ids=ids[:, 30:], past_key_values=cache)
    finally:
        qwen.requires_grad_(True)
        qwen.eval()
    assert cache.get_seq_length() == PROMPT
