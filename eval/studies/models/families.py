"""The decoders that the installed transformers has, found by looking through it, and variants that configs allow."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: What configs call the number of a layer's experts.
EXPERT_FIELDS = {"num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"}

#: Dense models that people use most; a release that lacks one does not list it.
DENSE = {
    *(
        "cohere2",
        "exaone4",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "glm4",
        "gpt2",
        "granite",
    ),
    *("lfm2", "lfm3", "llama", "ministral3", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_5"),
    *("qwen3_5_text", "smollm3"),
}

#: Configs with other layers than by default.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba, attention only": ("bamba", {"attn_layer_indices": [0, 1, 2]}),
    "bert, encoder": ("bert", {"is_decoder": False}),
    "doge, no window": ("doge", {"sliding_window": None}),
    "doge, experts": ("doge", {"is_moe": True}),
    "gemma4_text, experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gemma4_text, shared KV": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "granitemoehybrid, dense": ("granitemoehybrid", {"num_local_experts": 0}),
    "granitemoehybrid, with Mamba": ("granitemoehybrid", {"layer_types": ["attention", "mamba", "attention"]}),
    "jamba, attention only": ("jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}),
    "minimax, full attention": ("minimax", {"layer_types": ["full_attention"] * 3}),
    "minimax_m3_vl_text, full attention": ("minimax_m3_vl_text", {"layer_types": ["full_attention"] * 3}),
    "mllama, cross-attention": ("mllama", {"num_hidden_layers": 4, "cross_attention_layers": [1]}),
    "qwen3_next, full attention": ("qwen3_next", {"layer_types": ["full_attention"] * 3}),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """A model type of transformers, or a variant of one.

    Attributes
    ----------
    name : str
        The model type, and what differs from its default.
    model_type : str
        A key of transformers' auto classes.
    overrides : dict
        Fields of the config that differ.
    experts : bool
        Whether its config has a number of experts.
    """

    name: str
    model_type: str
    overrides: dict[str, Any]
    experts: bool

    @property
    def is_listed(self) -> bool:
        """Whether the table has a row of its own for it: those with experts, and the most used dense ones."""
        return self.experts or self.model_type in DENSE


def model_classes() -> dict[str, str]:
    """Return the class of each model type that generates text: its language model, else the model of several media."""
    found: dict[str, str] = {}
    groups = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
    mappings: list[Mapping[str, Any]] = [
        getattr(modeling_auto, f"MODEL_FOR_{group}_MAPPING_NAMES", {}) for group in groups
    ]
    for mapping in mappings:
        for model_type, names in mapping.items():
            found.setdefault(model_type, names if isinstance(names, str) else names[0])
    return found


def has_experts(model_type: str) -> bool:
    """Tell whether a model type's config, or one within it, has a number of experts."""
    return bool(_fields(CONFIG_MAPPING[model_type]) & EXPERT_FIELDS)


def _fields(config_class: Any) -> set[str]:
    """Return the names of a config's fields, and of those of the configs within it but vision's."""
    names = {
        *inspect.signature(config_class.__init__).parameters,
        *(getattr(config_class, "attribute_map", None) or {}),
    }
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        if inspect.isclass(inner) and inner.__name__ != "AutoConfig" and "vision" not in name:
            names |= _fields(inner)
    return names


def families() -> dict[str, Family]:
    """Return every decoder of the installed transformers by name: all language models, all others with experts."""
    known = model_classes()
    language = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    experts = {model_type: has_experts(model_type) for model_type in known}
    plain = {
        model_type: Family(model_type, model_type, {}, experts[model_type])
        for model_type in known
        if model_type in language or (experts[model_type] and not _translates(model_type))
    }
    variants = {
        name: Family(name, model_type, overrides, experts[model_type] and "dense" not in name)
        for name, (model_type, overrides) in VARIANTS.items()
        if model_type in plain
    }
    return dict(sorted({**plain, **variants}.items()))


def _translates(model_type: str) -> bool:
    return model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
