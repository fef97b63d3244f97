"""The cache on the Triton kernels: a model's decoding steps, here in Triton's interpreter, against the torch path."""

import importlib.util

import pytest
import torch
from budgeted_layer import budgeted_layer
from fake_attachment import EXPERTS
from families import FAMILIES

from pikv_hf import PiKVCache
from pikv_hf.config import PiKVConfig
from pikv_hf.kernels import dispatch
from pikv_hf.layer.attend import attend

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "triton" if torch.cuda.is_available() else "interpret"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize(
    ("family", "key_codec", "value_codec"),
    [("mixtral", "none", "none"), ("gpt_oss", "int4", "int8"), ("deepseek_v3", "lowrank+int4", "int2")],
)
def test_decoding_steps(family: str, key_codec: str, value_codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention sinks, different head dims, ragged rows and beams that share pages."""
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gpt_oss" else {}
    model = FAMILIES[family].build(num_hidden_layers=2, **layers).to(DEVICE)
    options = {"page_size": 16, "recent_window": 16, "num_shards": 2, "rank": 4}
    ids = torch.randint(3, 190, (1, 110), device=DEVICE)
    steps = torch.randint(3, 190, (2, 2, 1), device=DEVICE)
    logits = {}
    for backend in ("torch", BACKEND):
        # Packed by the same kernel both times: a key between two codes may be rounded either way.
        monkeypatch.setenv("PIKV_KERNELS", "torch")
        cache = PiKVCache.for_model(model, key_codec=key_codec, value_codec=value_codec, **options)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.batch_repeat_interleave(2)
            monkeypatch.setenv("PIKV_KERNELS", backend)
            logits[backend] = torch.stack([model(step, past_key_values=cache).logits for step in steps])
    assert not torch.equal(logits["torch"][0, 0], logits["torch"][0, 1])
    torch.testing.assert_close(logits[BACKEND], logits["torch"], atol=1e-4, rtol=1e-4)


@needs_triton
def test_a_mask_takes_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes no mask; a sliding window over pages needs one."""
    model = FAMILIES["mixtral_sliding"].build(num_hidden_layers=1).to(DEVICE)
    ids = torch.randint(3, 190, (2, 60), device=DEVICE)
    logits = {}
    for backend in ("torch", BACKEND):
        monkeypatch.setenv("PIKV_KERNELS", backend)
        cache = PiKVCache.for_model(model, page_size=16, recent_window=16, sliding_layers="paged")
        with torch.no_grad():
            model(ids, past_key_values=cache)
            logits[backend] = model(ids[:, :1], past_key_values=cache).logits
    assert torch.equal(logits[BACKEND], logits["torch"])


@needs_triton
def test_heads_of_different_lengths_and_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an eviction by head each KV head is a row of its own, with pages of several widths."""
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2).to(DEVICE)
    ids = torch.randint(3, 190, (2, 90), device=DEVICE)
    widths = torch.tensor([0, 2, 4, 8, 16], device=DEVICE)[torch.randint(0, 5, (2, 2, 2, 90), device=DEVICE)]
    logits = {}
    for backend in ("torch", BACKEND):
        monkeypatch.setenv("PIKV_KERNELS", "torch")
        cache = PiKVCache.for_model(model, page_size=16, recent_window=16, num_shards=2)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            for layer, chosen in zip(cache.layers, widths, strict=True):
                layer.keep(chosen)
            monkeypatch.setenv("PIKV_KERNELS", backend)
            logits[backend] = torch.stack([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(2)])
    torch.testing.assert_close(logits[BACKEND], logits["torch"], atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize(("key_codec", "value_codec"), [("none", "none"), ("int8", "none"), ("int4", "int8")])
@torch.no_grad()
def test_a_layer_of_latents(key_codec: str, value_codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents and rotary keys in pages of several pools, a window beside them, and the masses that budgets ask for."""
    options = {"page_size": 16, "recent_window": 16, "num_shards": 2, "budget": "1 MiB"}
    config = PiKVConfig(key_codec=key_codec, value_codec=value_codec, **options)
    rank, rotary, heads, tokens = 40, 16, 6, 130
    launched: list[str] = []
    real = dispatch.load

    def load(operation: str, how: dispatch.Backend) -> object:
        launched.append(operation)
        return real(operation, how)

    monkeypatch.setattr(dispatch, "load", load)
    results, shares = {}, {}
    for backend in ("torch", BACKEND):
        monkeypatch.setenv("PIKV_KERNELS", "torch")
        torch.manual_seed(0)
        layer = budgeted_layer(config)
        layer.update(torch.randn(2, 1, tokens, rank, device=DEVICE), torch.randn(2, 1, tokens, rotary, device=DEVICE))
        layer.record_experts(torch.randint(0, EXPERTS, (2 * tokens,)))
        layer.settle()
        monkeypatch.setenv("PIKV_KERNELS", backend)
        launched.clear()
        results[backend] = attend(layer, torch.randn(2, heads, 1, rank + rotary, device=DEVICE), absorbed=True)
        assert ("absorbed_decode_attention" in launched) == (backend != "torch")
        shares[backend] = [pool.usage.shares for pool in layer.table.pools.by_id().values()]
    assert any(each.sum() > 0 for each in shares["torch"])
    for part in (results, shares):
        for ours, expected in zip(part[BACKEND], part["torch"], strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
