"""The cache on the Triton kernels: a model's decoding steps, here in Triton's interpreter, against the torch path."""

import importlib.util

import pytest
import torch
from families import FAMILIES

from pikv_hf import PiKVCache

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
