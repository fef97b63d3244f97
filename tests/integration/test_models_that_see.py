"""Models with parts beside their text decoder: those take a cache as its layers do, and are never handed this one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach

IDS = torch.randint(2, 90, (2, 20), generator=torch.Generator().manual_seed(0))
VISION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 16, "patch_size": 8},
}
TEXT: dict[str, Any] = {**COMMON, "eos_token_id": 2}


def llama4() -> Any:
    text = FAMILIES["llama4"].build().config.to_dict()
    vision = {**VISION, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
    tokens = {"image_token_index": 100, "boi_token_index": 101, "eoi_token_index": 102}
    config = transformers.Llama4Config(text_config=text, vision_config=vision, **tokens)
    return transformers.Llama4ForConditionalGeneration(config)


def idefics2() -> Any:
    text = transformers.MistralConfig(**TEXT).to_dict()
    heads = {"num_key_value_heads": 2, "resampler_n_heads": 2, "resampler_head_dim": 16}
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 1, "hidden_size": 64, **heads}
    config = transformers.Idefics2Config(
        text_config=text, vision_config=VISION, perceiver_config=perceiver, image_token_id=100
    )
    return transformers.Idefics2ForConditionalGeneration(config)


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**TEXT))
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("build", [llama4, idefics2, llava])
def test_other_parts_are_left_alone(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    text = model.config.get_text_config(decoder=True)
    others = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    others = {key: config for key, config in others.items() if config not in (text, model.config)}
    before = {key: config._attn_implementation for key, config in others.items()}
    # That of the whole model is wrong about its own outputs in some releases.
    decoder = getattr(model, "language_model", model)

    def logits(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            parts = [decoder(part, past_key_values=cache).logits for part in IDS.split((14, 1, 5), dim=1)]
        return torch.cat(parts, dim=1)

    expected = logits(DynamicCache(config=model.config))
    cache = PiKVCache.for_model(model, placement="hash", page_size=4, recent_window=4)
    assert text._attn_implementation == "pikv"
    assert {key: config._attn_implementation for key, config in others.items()} == before
    assert (logits(cache) - expected).abs().max() <= 1e-4
    assert {cache.get_seq_length(index) for index in range(len(cache.layers))} == {20}
    detach(model)
    assert text._attn_implementation == "sdpa"
