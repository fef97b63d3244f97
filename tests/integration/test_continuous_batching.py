"""Continuous batching of an attached model: as without PiKV, and the model goes on afterwards."""

import contextlib
from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from transformers import DynamicCache, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from pikv_hf import PiKVCache, attach, detach
from pikv_hf.integration.continuous_batching import packed_causal_mask

#: Newer releases batch a few implementations of their own, by name.
BY_NAME = hasattr(ContinuousBatchingManager, "switch_to_cb_friendly_attn")
takes_any = pytest.mark.skipif(BY_NAME, reason="this transformers refuses to batch models whose attention is another's")

SETTINGS = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
LENGTHS = (20, 27, 34)


def batched(model: Any) -> list[list[int]]:
    """Return what is generated for prompts of several lengths, in the order of the requests."""
    rows = [row.tolist() for row in prompts(3, 34)["input_ids"]]
    inputs = [row[-length:] for row, length in zip(rows, LENGTHS, strict=True)]
    results = model.generate_batch(inputs=inputs, generation_config=SETTINGS, progress_bar=False)
    return [each.generated_tokens for each in sorted(results.values(), key=lambda each: each.request_id)]


@takes_any
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3_moe", {}),
        ("mixtral_sliding", {"sliding_window": 16}),
        # Sinks, and layers of both kinds.
        pytest.param("gpt_oss", {"sliding_window": 16}, marks=pytest.mark.slow),
    ],
)
def test_same_tokens_and_the_model_goes_on(family: str, options: dict[str, Any]) -> None:
    model = FAMILIES[family].build(**options)
    implementation = model.config._attn_implementation
    expected = batched(model)
    model.set_attn_implementation(implementation)
    inputs, more = prompts(2, 30), {"max_new_tokens": 4, "do_sample": False}
    cache, reference = PiKVCache.for_model(model, page_size=8), DynamicCache(config=model.config)
    first = model.generate(**inputs, past_key_values=cache, **more)
    assert batched(model) == expected
    turn = {
        "input_ids": torch.cat([first, first[:, -2:]], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 6), value=1),
    }
    second = model.generate(**turn, past_key_values=cache, **more)
    attach(model)
    assert model.config._attn_implementation == "pikv"
    assert batched(model) == expected
    detach(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model.generate(**inputs, past_key_values=reference, **more), first)
    assert torch.equal(model.generate(**turn, past_key_values=reference, **more), second)


@takes_any
def test_a_batch_that_fails_leaves_the_model_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["qwen3_moe"].build()
    implementation = model.config._attn_implementation
    attach(model)

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr("pikv_hf.integration.attention_function.attend_batched", fails)
        batched(model)
    cache = PiKVCache.for_model(model)
    assert model.config._attn_implementation == "pikv"
    model.generate(**prompts(2, 20), past_key_values=cache, max_new_tokens=3, do_sample=False)
    detach(model)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("window", [1, 3])
def test_mask_of_packed_sequences(window: int) -> None:
    """Each query sees the keys of its own sequence, of which the queries are the last, and padding everything."""
    queries, keys = [2, 1, 3], [2, 5, 4]
    ends = [torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]) for sizes in (queries, keys)]
    mask = packed_causal_mask(*ends, 8, 13, window)[0, 0]
    expected = torch.zeros(8, 13, dtype=torch.bool)
    row, column = 0, 0
    for new, held in zip(queries, keys, strict=True):
        for query in range(new):
            last = held - new + query
            first = 0 if window == 1 else max(0, last - window + 1)
            expected[row + query, column + first : column + last + 1] = True
        row, column = row + new, column + held
    expected[row:] = True
    assert torch.equal(mask, expected)


@pytest.mark.skipif(not BY_NAME, reason="this transformers batches attached models")
def test_where_it_is_refused_the_model_goes_on() -> None:
    model, inputs = FAMILIES["qwen3_moe"].build(), prompts(2, 20)
    expected = batched(model)
    cache = PiKVCache.for_model(model)
    more: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(**inputs, past_key_values=cache, **more)
    with pytest.raises(ValueError, match="Implementation pikv is not supported for continuous batching"):
        batched(model)
    again = PiKVCache.for_model(model)
    assert torch.equal(model.generate(**inputs, past_key_values=again, **more), first)
    detach(model)
    assert batched(model) == expected
