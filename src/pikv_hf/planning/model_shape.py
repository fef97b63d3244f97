"""What a plan must know of a model: parameters, experts and the geometry of its attention, from its config alone."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from pikv_hf.common.suggest import did_you_mean

#: Bits per weight of storage formats; mxfp4 has a scale of 8 bits per 32 weights (OCP Microscaling Formats, 2023).
WEIGHT_BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "fp8": 8.0, "int8": 8.0, "int4": 4.5, "mxfp4": 4.25}

# The storage formats that `quantization_config` names, of routed experts.
_QUANTISED = {"mxfp4": "mxfp4", "fp8": "fp8"}

#: Bytes per number of the dtypes in which K/V are made.
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# How configs name the experts that a token goes to.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k")


@dataclasses.dataclass(frozen=True, slots=True)
class LayerShape:
    """One decoder layer.

    Attributes
    ----------
    kv_heads, query_heads : int
        Heads of the stored keys and values, and of the queries.
    key_dim, value_dim : int
        Per head; of latent attention (DeepSeek) a latent and a rotary key. Behind values may be the keys of an indexer.
    sliding : int or None
        Tokens that a bounded sliding layer keeps at most; None for a paged one, 0 for one without K/V.
    state_bytes : int
        Of the convolution and recurrent states of a sequence, where there are such.
    experts, top_k : int
        Routed experts, and how many of them a token goes to; 0 without a router.
    expert_params : int
        Parameters of one routed expert.
    rotary_values : bool
        Whether values are the rotary parts of the keys, as where latents are cached.
    """

    kv_heads: int
    query_heads: int
    key_dim: int
    value_dim: int
    sliding: int | None = None
    state_bytes: int = 0
    experts: int = 0
    top_k: int = 0
    expert_params: int = 0
    rotary_values: bool = False

    @property
    def bounds_dim(self) -> int:
        """Channels of the bounds of keys that routing compares."""
        return self.key_dim + (self.value_dim if self.rotary_values else 0)

    @property
    def width(self) -> int:
        """Numbers that a token stores in this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclasses.dataclass(frozen=True, slots=True)
class ModelShape:
    """A model.

    Attributes
    ----------
    name : str
        What was asked for.
    layers : tuple of LayerShape
        By index.
    params, routed_params, unread_params : int
        All parameters; those of routed experts; those of an embedding table, of which a step reads a row per token.
    dtype : str
        Of keys and values, and of what else is not quantised.
    routed_bits, dense_bits : float
        Bits per parameter of routed experts, and of the rest.
    max_positions : int or None
        The longest context of the config.
    """

    name: str
    layers: tuple[LayerShape, ...]
    params: int
    routed_params: int
    unread_params: int
    dtype: str = "bfloat16"
    routed_bits: float = 16.0
    dense_bits: float = 16.0
    max_positions: int | None = None

    @property
    def element_size(self) -> int:
        """Bytes per number of K/V as they are made."""
        return DTYPE_BYTES[self.dtype]

    @property
    def paged_layers(self) -> tuple[LayerShape, ...]:
        """The layers that keep all tokens."""
        return tuple(layer for layer in self.layers if layer.sliding is None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self._bytes(self.routed_params, self.params - self.routed_params)

    def read_weight_bytes(self, batch: int) -> int:
        """Return the bytes of weights that a decoding step of `batch` tokens reads: of the experts, those chosen."""
        routed = sum(expected_experts(each.experts, each.top_k, batch) * each.expert_params for each in self.layers)
        return self._bytes(routed, self.params - self.routed_params - self.unread_params)

    def active_params(self) -> int:
        """Return the parameters that a token is multiplied with."""
        return (
            self.params - self.routed_params - self.unread_params + sum(x.top_k * x.expert_params for x in self.layers)
        )

    def _bytes(self, routed: float, rest: int) -> int:
        return int((routed * self.routed_bits + rest * self.dense_bits) / 8)


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    """Return how many distinct experts `tokens` tokens choose, each `top_k` of `experts` alike: E (1 - (1 - k/E)^B)."""
    return experts * (1 - (1 - top_k / experts) ** tokens) if experts else 0.0


def load_config(name: str, bundled: Path | None = None) -> Any:
    """Return the config of a model.

    Parameters
    ----------
    name : str
        A folder with a `config.json`, such a file, a model whose config is in `bundled`, or a name on the Hub.
    bundled : Path, optional
        A folder of configs, `Qwen3-30B-A3B.json`, for names with or without their owner.

    Raises
    ------
    ValueError
        If there is none, or it is of no known architecture.
    """
    from transformers import AutoConfig

    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file() and bundled is not None and (known := bundled_config(name, bundled)) is not None:
        file = known
    if file.is_file():
        return _config_of(file)
    if path.is_dir():
        raise ValueError(f"folder {name!r} has no config.json")
    stems = [] if bundled is None else sorted(each.stem for each in bundled.glob("*.json"))
    missing = f"no config for model {name!r}: it is no file, no folder and none of the bundled {', '.join(stems)}"
    if "/" not in name:
        raise ValueError(f"{missing}{did_you_mean(name, stems)}; names on the Hub have an owner, as org/name")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, KeyError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{missing}, and the Hub gave none: {first}") from error


def bundled_config(name: str, folder: Path) -> Path | None:
    """Return the bundled config of a model's name, in upper or lower case, None if there is none."""
    wanted = name.rpartition("/")[2].lower()
    return next((path for path in sorted(folder.glob("*.json")) if path.stem.lower() == wanted), None)


def _config_of(file: Path) -> Any:
    from transformers import AutoConfig

    try:
        values = json.loads(file.read_text())
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError("it has no model_type")
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{os.fspath(file)!r} is no config that transformers knows: {first}") from error


def shape_of(config: Any, name: str, dtype: str | None = None, weights: str | None = None) -> ModelShape:
    """Return the shape of the model that transformers builds from a config, without allocating a weight.

    Parameters
    ----------
    config : PreTrainedConfig
        Of a decoder.
    name : str
        Of the model.
    dtype : str, optional
        Of K/V and unquantised weights, one of :data:`DTYPE_BYTES`; by default the config's.
    weights : str, optional
        How all weights are stored, one of :data:`WEIGHT_BITS`; by default as the config says.

    Raises
    ------
    ValueError
        For an unknown dtype, and models whose state is not a K/V cache.
    """
    from pikv_hf.layer.own_layer import layers_of

    text = config.get_text_config(decoder=True)
    dtype = _dtype(dtype or str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch."))
    layers = layers_of(config)
    model = _meta_model(config, name)
    experts, routed = _expert_params(model)
    shapes = tuple(
        dataclasses.replace(shape, experts=experts[index][0], expert_params=experts[index][1], top_k=_top_k(text))
        if index in experts
        else shape
        for index, shape in enumerate(_layer_shapes(model, layers, text))
    )
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    dense_bits, routed_bits = _bits(config, dtype, weights)
    return ModelShape(
        name=name,
        layers=shapes,
        params=sum(parameter.numel() for parameter in model.parameters()),
        routed_params=routed,
        unread_params=0 if tied else embedding.numel(),
        dtype=dtype,
        routed_bits=routed_bits,
        dense_bits=dense_bits,
        max_positions=getattr(text, "max_position_embeddings", None),
    )


def _dtype(name: str) -> str:
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {name!r}")
    return name


def _bits(config: Any, dtype: str, weights: str | None) -> tuple[float, float]:
    """Return the bits per parameter outside of routed experts and in them."""
    if weights is not None:
        if weights not in WEIGHT_BITS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHT_BITS)}, got {weights!r}")
        return WEIGHT_BITS[weights], WEIGHT_BITS[weights]
    quantised = getattr(config, "quantization_config", None) or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    routed = _QUANTISED.get(str(method), dtype)
    # fp8 checkpoints quantise every linear layer, mxfp4 ones the experts alone.
    return WEIGHT_BITS["fp8" if routed == "fp8" else dtype], WEIGHT_BITS[routed]


def _meta_model(config: Any, name: str) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"transformers has no causal language model for {name!r}: {first}") from error
    # Every weight was replaced by one of its own.
    model.tie_weights()
    return model


def _expert_params(model: Any) -> tuple[dict[int, tuple[int, int]], int]:
    """Return, by layer, the number of routed experts and the parameters of one; and those of all together."""
    counts: dict[int, int] = {}
    sums: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        path = name.split(".")
        index = next((int(part) for part in path if part.isdigit()), None)
        # Stacked along the first dimension, some without a module of that name (Granite, JetMoE).
        if index is None or ("experts" not in path and parameter.ndim < 3):
            continue
        sums[index] = sums.get(index, 0) + parameter.numel()
        if index not in counts:
            experts: Any = (
                model.get_submodule(".".join(path[: path.index("experts") + 1])) if "experts" in path else None
            )
            known = len(experts) if hasattr(experts, "__len__") else getattr(experts, "num_experts", None)
            counts[index] = int(known or parameter.shape[0])
    return {index: (counts[index], sums[index] // counts[index]) for index in counts}, sum(sums.values())


def _top_k(text: Any) -> int:
    for config in (text, getattr(text, "ffn_config", None)):
        for name in _TOP_K:
            if isinstance(value := getattr(config, name, None), int):
                return value
    raise ValueError(f"{type(text).__name__} does not say how many experts a token goes to (looked for {_TOP_K})")


def _layer_shapes(model: Any, layers: list[Any], text: Any) -> list[LayerShape]:
    """Return the shapes of the layers of a cache, as a `PiKVCache` divides them into paged and transformers' own."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    from pikv_hf.common.transformers_release import config_of_layer
    from pikv_hf.integration.latent_attention import expands_latents
    from pikv_hf.integration.latent_code import caches_expanded_latents
    from pikv_hf.layer.own_layer import has_positions, indexer_dims
    from pikv_hf.planning.state_bytes import bytes_of_states

    states = bytes_of_states(model, layers)
    kinds: set[Any] = {type(module) for module in model.modules()}
    # Where transformers caches what latents are expanded to, a cache of an attached model stores the latents.
    latent = any(expands_latents(kind) or caches_expanded_latents(kind) for kind in kinds)
    indexed = indexer_dims(text, layers)
    shapes = []
    for index, layer in enumerate(layers):
        if not has_positions(layer):
            shapes.append(LayerShape(0, 0, 0, 0, sliding=0, state_bytes=states.get(index, 0)))
            continue
        # transformers keeps one token less than the window: the query's own is the last of it.
        sliding = int(layer.sliding_window) - 1 if isinstance(layer, DynamicSlidingWindowLayer) else None
        own = config_of_layer(text, index)
        queries = int(own.num_attention_heads)
        heads, keys, values = _head_dims(own, queries, latent)
        # What an indexer compares lies behind the values, divided among the heads.
        share = -(-(indexed[index] or 0) // heads)
        rotary = latent and indexed[index] is None
        shapes.append(LayerShape(heads, queries, keys, values + share, sliding, rotary_values=rotary))
    return shapes


def _head_dims(text: Any, queries: int, latent: bool) -> tuple[int, int, int]:
    """Return KV heads, and the dims of a key and a value: of latents, one latent and its rotary key."""
    if latent:
        return 1, int(text.kv_lora_rank), int(text.qk_rope_head_dim)
    if getattr(text, "kv_lora_rank", None) and getattr(text, "qk_nope_head_dim", None):
        # Latent attention of code that is not known: keys and values of all heads, as they are after the up-projection.
        return queries, int(text.qk_nope_head_dim + text.qk_rope_head_dim), int(text.v_head_dim)
    heads = getattr(text, "num_key_value_heads", None) or getattr(
        getattr(text, "attn_config", None), "kv_n_heads", None
    )
    dim = getattr(text, "head_dim", None) or getattr(text, "kv_channels", None) or text.hidden_size // queries
    return int(heads or queries), int(dim), int(dim)
