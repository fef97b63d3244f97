"""What codecs on latents do to the logits of random models with latent attention, tiny and larger."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.integration.latent_attention import expands_latents

from ..models.tiny_models import tiny_model

#: Codecs of latents and of rotary keys.
PAIRS = (("int8", "none"), ("int8", "int8"), ("int4", "none"), ("int4", "int8"), ("int4", "int4"), ("fp8", "none"))

#: Prompt, and steps after it.
TOKENS, STEPS = 1024, 8


@dataclasses.dataclass(frozen=True, slots=True)
class ModelError:
    """One model with one pair of codecs.

    Attributes
    ----------
    model, latents, rotary : str
        By name.
    error : float
        ||logits - exact logits|| / ||exact logits - their mean||, over the steps.
    same_token : float
        Share of the steps in which the largest logit is the same.
    """

    model: str
    latents: str
    rotary: str
    error: float
    same_token: float


def larger_model() -> Any:
    """Return a random DeepSeek-V3 of 3 layers with the real latent, rotary key and head dims, and 16 heads."""
    config = DeepseekV3Config(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=384,
        rope_scaling=None,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # So that no layer's part is small beside that of the others.
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            parameter.data.mul_(torch.randn_like(parameter).mul_(0.3).exp_())
    return model


def model_errors(tokens: int = TOKENS, pairs: Sequence[tuple[str, str]] = PAIRS) -> Iterator[ModelError]:
    """Compare the logits of both models with those without a codec; nothing where no latents are cached."""
    for name, make in (("tiny", lambda: tiny_model("deepseek_v3")), ("16 heads, 512 + 64", larger_model)):
        model = make()
        if any(expands_latents(type(module)) for module in model.modules()):
            exact = _logits(model, tokens, "none", "none")
            for latents, rotary in pairs:
                logits = _logits(model, tokens, latents, rotary)
                error = (logits - exact).norm() / (exact - exact.mean(dim=-1, keepdim=True)).norm()
                same = (logits.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean()
                yield ModelError(name, latents, rotary, float(error), float(same))


@torch.no_grad()
def _logits(model: Any, tokens: int, latents: str, rotary: str) -> torch.Tensor:
    """Return the logits of the steps after a prompt, `(STEPS, V)`, all of the same tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size - 3, (1, tokens + STEPS), generator=generator)
    cache = PiKVCache.for_model(model, key_codec=latents, value_codec=rotary, placement="hash", num_shards=1)
    model(ids[:, :tokens], **cache_argument(cache), logits_to_keep=1)
    steps = [model(ids[:, at : at + 1], **cache_argument(cache)).logits[0] for at in range(tokens, tokens + STEPS)]
    detach(model)
    return torch.cat(steps)
