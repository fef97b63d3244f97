"""Tiny random models of every decoder that transformers has, made from their configs' defaults.

What differs between families is left as the config's author has it: kinds of layers, routers, norms, rotary embeddings.
Sizes shrink by what they are called, and a few families say what their own names mean.
"""

import inspect
from typing import Any

import torch
import transformers

from pikv_hf.eval.studies.models.families import model_classes

VOCAB = 131
#: A config with more is not small: what makes it so large is not known here.
MOST_PARAMETERS = 100_000_000

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
    **dict.fromkeys(("index_n_heads", "indexer_n_heads"), 2),
    **{"indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4},
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
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    **dict.fromkeys(("swa_head_dim", "router_hidden_size"), 16),
    **dict.fromkeys(
        ("text_hidden_size", "out_hidden_size", "projection_hidden_dim", "projection_intermediate_size"), 64
    ),
    "unpadded_vocab_size": VOCAB,
    "sliding_window_size": 24,
    "depth": 2,
}

#: What says which layers a model has: where a family says it, its default is not asked.
LAYERS = {"layer_types", "layers_block_type", "num_hidden_layers"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

#: What a family's own names mean, and what its checks demand.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "cpmant": {"prompt_length": 4},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "activation_sparsity_pattern": [0.0] * 10},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 32],
        "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]},
    },
    "glm5_next_text": {"qk_rope_head_dim": 0, "qk_head_dim": 16},
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm_moe_dsa": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["attention"] * 3, "mamba_n_heads": 8},
    "hy_v4_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {
        **{"num_layers": 2, "num_hidden_layers": 4, "zero_expert_num": 2, "head_dim": 8},
    },
    "llama4_text": {"no_rope_layers": [1, 1, 0], "num_hidden_layers": 3},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        **{"layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"], "index_n_heads": 2},
        **{"index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 4, "index_local_blocks": 1},
    },
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [16] * 4, "depths": [1] * 4},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 120},
    "reformer": {"attn_layers": ["local", "lsh", "local"], "axial_pos_embds": False},
    "zamba": {"num_hidden_layers": 12},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 0.5},
}


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """Return a config of a model type with sizes that a CPU runs in milliseconds."""
    return _shrunk(_model_class(model_type).config_class, model_type, overrides)


def _model_class(model_type: str) -> Any:
    return getattr(transformers, model_classes()[model_type])


def _shrunk(config_class: Any, model_type: str, overrides: dict[str, Any]) -> Any:
    parameters = inspect.signature(config_class.__init__).parameters
    mapped_names = getattr(config_class, "attribute_map", None) or {}
    names = {*parameters, *mapped_names}
    sizes = {name: size for name, size in SIZES.items() if name in parameters or name.endswith("token_id")}
    for name, size in SIZES.items():
        mapped = mapped_names.get(name)
        if mapped is not None and mapped in parameters and mapped not in SIZES:
            sizes[mapped] = size
    if "kv_lora_rank" in parameters:
        # Multi-head latent attention has a key for each query head.
        sizes |= {name: 4 for name in ("num_key_value_heads",) if name in parameters}
    special = SPECIAL.get(model_type, {})
    subs = {}
    for name, sub in config_class.sub_configs.items():
        if name in names and name not in special and (kind := _class_of(config_class, name, sub)) is not None:
            subs[name] = _shrunk(kind, kind.model_type, {}).to_dict()
    given = {**sizes, **subs, **special, **overrides}
    if "layer_types" in parameters and not LAYERS & {*special, *overrides}:
        given |= _every_kind(config_class)
    return config_class(**given)


def _class_of(config_class: Any, name: str, declared: Any) -> Any:
    """Return the class of a config within another, by default where any is allowed; None if there is none."""
    if inspect.isclass(declared) and declared.__name__ != "AutoConfig":
        return declared
    try:
        default = getattr(config_class(), name)
    except Exception:
        return None
    return None if default is None else type(default)


def _every_kind(config_class: Any) -> dict[str, Any]:
    """Return the layers of a model that by default has several kinds: each of them twice, in the order they come in."""
    try:
        kinds = list(dict.fromkeys(config_class().layer_types or ()))
    except Exception:
        # Some configs have no default that passes their own checks.
        return {}
    return {"layer_types": kinds * 2, "num_hidden_layers": 2 * len(kinds)} if len(kinds) > 1 else {}


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """Return a random decoder of a type, whose greedy outputs are not trivial.

    Raises
    ------
    ValueError
        If the sizes that are known here do not make it small.
    """
    config = tiny_config(model_type, **overrides)
    model_class = _model_class(model_type)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"no small config: {parameters / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model
