"""Tiny random models of every causal language model class that transformers has, made from their configs' defaults.

What differs between families is left as the config's author has it: kinds of layers, routers, norms, rotary embeddings.
Sizes shrink by what they are called, and a few families say what their own names mean.
"""

import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 131

#: Sizes by what configs call them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "n_inner"), 64),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "emb_dim", "lru_width", "dim_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 3),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "attention_head_dim", "global_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "dim_ff", "d_ff", "ffn_hidden_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "block_ff_dim", "feed_forward_size", "dff"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"), 24),
    **dict.fromkeys(("q_lora_rank", "index_head_dim"), 24),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "index_topk"), 16),
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "index_n_heads": 2,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "hidden_size_per_layer_input": 16,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.15,
    "is_decoder": True,
    **dict.fromkeys(("sliding_window_pattern", "global_attn_every_n_layers"), 2),
    **dict.fromkeys(("num_encoder_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
}

#: What a family's own names mean, and what its checks demand.
SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "cpmant": {"prompt_length": 4},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "activation_sparsity_pattern": [0.0] * 10},
    "glm_moe_dsa": {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["attention"] * 3, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {
        **{"num_layers": 2, "num_hidden_layers": 4, "num_key_value_heads": 4, "zero_expert_num": 2, "head_dim": 8},
    },
    "llama4_text": {"no_rope_layers": [1, 1, 0]},
    "mamba2": {"num_heads": 8},
    "reformer": {"attn_layers": ["local", "lsh", "local"], "axial_pos_embds": False},
    "zamba": {"num_hidden_layers": 12},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 0.5},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return a config of a model type with sizes that a CPU runs in milliseconds."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return _shrunk(model_class.config_class, model_type, overrides)


def _shrunk(config_class: Any, model_type: str, overrides: dict[str, Any]) -> Any:
    parameters = inspect.signature(config_class.__init__).parameters
    names = {*parameters, *getattr(config_class, "attribute_map", {})}
    sizes = {name: size for name, size in SIZES.items() if name in parameters or name.endswith("token_id")}
    for name, size in SIZES.items():
        mapped = config_class.attribute_map.get(name)
        if mapped in parameters and mapped not in SIZES:
            sizes[mapped] = size
    subs = {}
    for name, sub in config_class.sub_configs.items():
        is_known = inspect.isclass(sub) and sub.__name__ != "AutoConfig"
        if name in names and name not in SPECIAL.get(model_type, {}) and is_known:
            subs[name] = _shrunk(sub, sub.model_type, {}).to_dict()
    given = {**sizes, **subs, **SPECIAL.get(model_type, {}), **overrides}
    return config_class(**given)


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """Return a random causal language model of a type, whose greedy outputs are not trivial."""
    config = tiny_config(model_type, **overrides)
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model
