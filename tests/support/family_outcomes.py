"""What becomes of each causal language model class of transformers when it is attached: same tokens, or a refusal."""


def _names(text: str) -> set[str]:
    return set(text.split())


#: Attached by position: the same as DynamicCache. They have no router that could be followed.
DENSE = _names("""
    apertus arcee bart bert bert-generation biogpt bitnet blenderbot blenderbot-small camembert code_llama cohere
    cohere2 cwm data2vec-text electra emu3 ernie ernie4_5 exaone4 fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text glm
    glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neox granite helium hunyuan_v1_dense jais2 llama marian mbart ministral ministral3
    mistral mllama modernbert-decoder nanochat olmo olmo2 olmo3 opt pegasus persimmon phi phi3 phi4_multimodal plbart
    qwen2 qwen3 roberta roberta-prelayernorm roc_bert seed_oss smollm3 stablelm starcoder2 vaultgemma xlm-roberta
    xlm-roberta-xl xmod youtu
    """)

#: Attached by their routers.
ROUTED = _names("""
    afmoe aria_text dbrx deepseek_v2 deepseek_v3 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite gpt_oss
    granitemoe granitemoehybrid granitemoeshared hunyuan_v1_moe jetmoe llama4 llama4_text longcat_flash minimax_m2
    mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open
    """)

#: Refused, by what the message says of them.
REFUSED: dict[str, set[str]] = {
    # Attention that the models compute themselves, and mixers that keep other state than K/V.
    "hands the cache to": _names("""
        big_bird bloom codegen cpmant ctrl diffllama falcon falcon_h1 git gpt_neo gpt_neox_japanese gptj
        megatron-bert moshi mpt mvp nemotron prophetnet rembert roformer trocr xglm xlm xlstm
        """),
    "keeps recurrent state": {"falcon_mamba", "mamba", "mamba2"},
    "has no decoder self-attention": {"openai-gpt", "reformer", "rwkv", "xlnet"},
    "has layers of type": _names("""
        bamba jamba lfm2_moe minimax qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma zamba
        zamba2
        """),
    "a cache of its own": {"lfm2"},
    # They choose tokens by K/V that they take for those of all tokens.
    r"computes `.*` from (key|value)_states": {"doge", "glm_moe_dsa"},
    "reads layers of the cache by itself": {"whisper"},
    "is not causal": {"bigbird_pegasus"},
}

#: Not run, and why.
NOT_RUN = {
    "blt": "no small config: its encoder's hash tables have 190 million parameters",
    "gemma3n": "needs timm; gemma3n_text is its language model",
    "got_ocr2": "no small config: 470 million parameters; qwen2 is its language model",
    "musicgen": "generates codes of audio in several books at once",
    "musicgen_melody": "generates codes of audio in several books at once",
}

#: Of these, configs with other layers than by default, and what becomes of them.
VARIANTS: list[tuple[str, dict[str, object], str]] = [
    ("granitemoehybrid", {"layer_types": ["attention", "mamba", "attention"]}, "has layers of type mamba"),
    ("granitemoehybrid", {"num_local_experts": 0}, "same"),
    ("jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}, "same"),
    ("bamba", {"attn_layer_indices": [0, 1, 2]}, "same"),
    ("qwen3_next", {"layer_types": ["full_attention"] * 3}, "same"),
    ("minimax", {"layer_types": ["full_attention"] * 3}, "a cache of its own"),
    ("mllama", {"num_hidden_layers": 4, "cross_attention_layers": [1]}, "reads layers of the cache by itself"),
    ("doge", {"sliding_window": None}, "computes `dt_states"),
    ("bert", {"is_decoder": False}, "is not causal"),
]
