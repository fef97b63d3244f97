"""Small random models of real architectures, one builder per family."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers

VOCAB = 199
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # Never produced on purpose: every run then has the same length, and the comparison covers all steps.
    "eos_token_id": VOCAB - 1,
}
MLA: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
# Of Granite's two families fp32 itself is up to 1.6e-4 from float64 with COMMON's weights, in transformers' eager and
# sdpa attention alike: two fp32 runs cannot agree to 1e-4. tests/integration/test_exact.py compares those
# weights with float64.
CALMER: dict[str, Any] = {"initializer_range": 0.15}
GROUPED: dict[str, Any] = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its config and model class names in transformers, and what differs from COMMON."""

    config: str
    model: str
    options: dict[str, Any]
    routed: bool = True
    sliding: bool = False

    def build(self, seed: int = 0, **overrides: Any) -> Any:
        """Return a random model whose greedy outputs are not trivial."""
        config = getattr(transformers, self.config)(**{**COMMON, **self.options, **overrides})
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config).eval()
        for name, parameter in model.named_parameters():
            # Biases, sinks and norms start at 0 or 1: give each a value of its own, so that forgetting one shows.
            if parameter.ndim == 1 and "correction" not in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)
            elif "router" in name or "gate.weight" in name:
                parameter.data.mul_(2)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.1)
        model.generation_config.eos_token_id = None
        return model


def _moe(prefix: str, options: dict[str, Any], **kwargs: Any) -> Family:
    return Family(f"{prefix}Config", f"{prefix}ForCausalLM", options, **kwargs)


_QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
_HALF_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Family] = {
    "mixtral": _moe("Mixtral", {**_LOCAL, "sliding_window": None}),
    "mixtral_sliding": _moe("Mixtral", {**_LOCAL, "sliding_window": 24}, sliding=True),
    "qwen2_moe": _moe("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": _moe("Qwen3Moe", {**_QWEN, "head_dim": 16}),
    "olmoe": _moe("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "flex_olmo": _moe("FlexOlmo", {"num_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": _moe(
        "GptOss", {**_LOCAL, "head_dim": 16, "sliding_window": 24, "layer_types": _HALF_SLIDING}, sliding=True
    ),
    "deepseek_v2": _moe(
        "DeepseekV2",
        {
            **MLA,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3": _moe("DeepseekV3", {**MLA, **GROUPED, "moe_intermediate_size": 32, "first_k_dense_replace": 1}),
    "phimoe": _moe("Phimoe", {**_LOCAL, "sliding_window": None}),
    "granitemoe": _moe("GraniteMoe", {**_LOCAL, **CALMER, "attention_multiplier": 0.25}),
    "granitemoeshared": _moe("GraniteMoeShared", {**_LOCAL, **CALMER, "shared_intermediate_size": 32}),
    "glm4_moe": _moe("Glm4Moe", {**GROUPED, "moe_intermediate_size": 32, "head_dim": 16, "first_k_dense_replace": 1}),
    "minimax_m2": _moe("MiniMaxM2", {**_LOCAL, "head_dim": 16, "rotary_dim": 8}),
    "ernie4_5_moe": _moe(
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 1,
        },
    ),
    "dots1": _moe(
        "Dots1",
        {**GROUPED, "n_shared_experts": 1, "moe_intermediate_size": 32, "head_dim": 16, "first_k_dense_replace": 1},
    ),
    "hunyuan_v1_moe": _moe("HunYuanMoEV1", {"num_experts": 8, "moe_topk": 2, "head_dim": 16}),
    "dbrx": Family(
        "DbrxConfig",
        "DbrxForCausalLM",
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 3,
            "max_seq_len": 4096,
            "tie_word_embeddings": False,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    "solar_open": _moe("SolarOpen", {**GROUPED, "moe_intermediate_size": 32, "head_dim": 16}),
    "glm4_moe_lite": _moe("Glm4MoeLite", {**MLA, **GROUPED, "q_lora_rank": 32, "moe_intermediate_size": 32}),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **_LOCAL,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": 32,
            "interleave_moe_layer_step": 1,
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0],
        },
        sliding=True,
    ),
    # Two attentions in a decoder layer, of which the first has the layer's router; some experts compute nothing.
    "longcat_flash": _moe(
        "LongcatFlash",
        {
            **{**MLA, "q_lora_rank": 32, "num_layers": 2, "num_hidden_layers": 4, "head_dim": 8, "ffn_hidden_size": 64},
            **{"expert_ffn_hidden_size": 32, "n_routed_experts": 6, "zero_expert_num": 2, "moe_topk": 2},
        },
    ),
    # The router is a linear layer, whose logits the experts take.
    "aria": Family(
        "AriaTextConfig", "AriaTextForCausalLM", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1}
    ),
    "jetmoe": _moe("JetMoe", {**_LOCAL, "kv_channels": 16, "num_key_value_heads": 2}),
    "llama": _moe("Llama", {}, routed=False),
}


# Of each kind of attention one, for development: plain, with sinks and sliding windows, and with head dims that differ.
QUICK = ("mixtral", "gpt_oss", "deepseek_v3")
#: For `pytest.mark.parametrize`: all names, of which `--fast` takes the quick ones.
EVERY_FAMILY = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def prompts(batch: int = 3, length: int = 75, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return a left-padded batch, the first row the most padded, the last not at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB - 1, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(range(length // 3, 0, -max(1, length // (3 * max(1, batch - 1))))):
        if row < batch - 1:
            mask[row, :padding] = 0
            ids[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}
