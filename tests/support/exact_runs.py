"""Generation with a cache beside generation with DynamicCache and eager attention, and their comparison."""

from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf import detach


def reference(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> Any:
    detach(model)
    model.set_attn_implementation("eager")
    return generate(model, inputs, DynamicCache(config=model.config.get_text_config()), **kwargs)


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **kwargs: Any) -> Any:
    options = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    return model.generate(**inputs, past_key_values=cache, **{**options, **kwargs})


def assert_same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        assert (a - b).abs().max() <= 1e-4, f"step {step}"
