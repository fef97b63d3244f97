"""Keys, values and queries to measure codecs on: of trained models, of larger random ones, and difficult keys."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.tasks import reference
from pikv_hf.eval.tasks.perplexity import text_windows
from pikv_hf.integration.expert_router import experts_from_output
from pikv_hf.layer.layer_codecs import ERROR_QUERY_POSITIONS

from .read_once import captured
from .real_text import texts

#: Queries at the end of a prompt whose attention is measured, and those just before them, which a cache has seen when
#: it packs what came before.
QUERIES, OBSERVED = 48, ERROR_QUERY_POSITIONS

#: Experts per layer of all models here.
EXPERTS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionInput:
    """What one attention layer saw of one prompt of T tokens.

    Attributes
    ----------
    query : torch.Tensor
        `(Hq, Q, D)` float32, of the last Q tokens, rotary embedding applied.
    keys, values : torch.Tensor
        `(H, T, D)` and `(H, T, Dv)` float32; keys with rotary embedding applied.
    experts : torch.Tensor
        `(T,)` int64, the first choice of the layer's router.
    observed : torch.Tensor
        `(Hq, OBSERVED, D)` float32, queries of the tokens before the last Q.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    experts: torch.Tensor
    observed: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """The attention of a published model on top of random weights, two layers with eight small experts.

    Attributes
    ----------
    family : str
        Prefix of its classes in transformers.
    options : dict
        Of its config, beside :data:`_COMMON`.
    bias_scale : float
        Standard deviation of random biases of queries, keys and values; three channels of each key head have 50 times
        as much. 0 leaves the biases as they are initialised.
    """

    family: str
    options: dict[str, Any]
    bias_scale: float = 0.0


_COMMON: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: Heads and head dims of published models. gpt-oss has full attention in both layers here, and its sinks, which share
#: in every softmax alike, are left out. Qwen2.5's large key biases are those of "qwen2-57b-a14b, biases".
GEOMETRIES: dict[str, Geometry] = {
    "qwen3-30b-a3b": Geometry(
        "Qwen3Moe", {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": EXPERTS}
    ),
    "mixtral-8x7b": Geometry(
        "Mixtral", {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": EXPERTS}
    ),
    "gpt-oss-20b": Geometry(
        "GptOss",
        {
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": EXPERTS,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "qwen2-57b-a14b, biases": Geometry(
        "Qwen2Moe",
        {
            "hidden_size": 28 * 128,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 64,
        },
        bias_scale=1.0,
    ),
}


def reference_inputs(length: int = 1024, samples: int = 1) -> list[AttentionInput]:
    """Return the layers of the bundled model, each on `samples` prompts of every task, answers included.

    Parameters
    ----------
    length : int
        Tokens per prompt at most, its answer included.
    samples : int
        Prompts per task.
    """
    model, tokenizer = load_reference_model()
    found = []
    for sample in reference.generate(length, samples):
        text = sample.context + sample.question + sample.answer_prefix + " " + sample.extra["exact"]
        found += _attention_inputs(model, tokenizer(text, return_tensors="pt").input_ids)
    return found


def random_inputs(name: str, tokens: int = 1024) -> list[AttentionInput]:
    """Return the layers of a random model on random tokens.

    Parameters
    ----------
    name : str
        One of :data:`GEOMETRIES`.
    tokens : int
        T.
    """
    geometry = GEOMETRIES[name]
    config = getattr(transformers, f"{geometry.family}Config")(**{**_COMMON, **geometry.options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{geometry.family}ForCausalLM")(config).eval()
    if geometry.bias_scale:
        _set_biases(model, geometry.bias_scale)
    return _attention_inputs(model, torch.randint(3, config.vocab_size, (1, tokens)))


def pretrained_inputs(name: str, tokens: int, windows: int) -> dict[int, list[AttentionInput]]:
    """Return the layers of a pretrained dense model, by number, each on windows of prose and of code.

    Parameters
    ----------
    name : str
        As of `pikv eval --model`.
    tokens : int
        T.
    windows : int
        Of each text, evenly spread.
    """
    model, tokenizer = load_model(name, "float32")
    found: dict[int, list[AttentionInput]] = {}
    for read in texts():
        for window in text_windows(read.ids(tokenizer), tokens, windows, 1):
            with captured(model, QUERIES + OBSERVED) as layers:
                model.model(window.ids, use_cache=False)
            for index, (query, keys, values) in enumerate(layers):
                queries = query[0, :, OBSERVED:], query[0, :, :OBSERVED]
                experts = torch.zeros(tokens, dtype=torch.long)
                own = AttentionInput(queries[0], keys[0], values[0], experts, queries[1])
                found.setdefault(index, []).append(own)
    return found


@torch.no_grad()
def _set_biases(model: Any, scale: float) -> None:
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.bias.normal_(std=scale)
        heads = attention.k_proj.bias.view(-1, attention.head_dim)
        for head in heads:
            head[torch.randperm(len(head))[:3]] *= 50


@torch.inference_mode()
def _attention_inputs(model: Any, ids: torch.Tensor) -> list[AttentionInput]:
    with captured(model, QUERIES + OBSERVED) as layers, _captured_experts(model) as experts:
        model.model(ids, use_cache=False)
    return [
        AttentionInput(query[0, :, OBSERVED:], keys[0], values[0], chosen, query[0, :, :OBSERVED])
        for (query, keys, values), chosen in zip(layers, experts, strict=True)
    ]


@contextmanager
def _captured_experts(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the primary expert of every token in every layer."""
    seen: list[torch.Tensor] = []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        seen.append(experts_from_output(output, EXPERTS))

    routers = [getattr(layer.mlp, "gate", None) or layer.mlp.router for layer in model.model.layers]
    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


#: What is done to keys, after rotary embedding, that a format for ordinary ones may not survive.
DIFFICULT = ("large channels", "offset channels", "offset", "large token", "large negated token")


def difficult(layer: AttentionInput, case: str) -> AttentionInput:
    """Return a layer with difficult keys.

    Parameters
    ----------
    layer : AttentionInput
        Ordinary ones.
    case : str
        One of :data:`DIFFICULT`: three channels 50, 75 and 100 times larger; constants 50, -75 and 100 added to three
        channels, as Qwen2.5's biases do; 20 added to all channels; one coded token 100 or -100 times as large.

    Raises
    ------
    ValueError
        For another case.
    """
    keys = layer.keys.clone()
    channels = torch.randperm(keys.shape[-1], generator=torch.Generator().manual_seed(0))[:3]
    token = keys.shape[1] // 3
    if case == "large channels":
        keys[..., channels] *= torch.tensor([50.0, 75.0, 100.0])
    elif case == "offset channels":
        keys[..., channels] += torch.tensor([50.0, -75.0, 100.0])
    elif case == "offset":
        keys += 20
    elif case == "large token":
        keys[:, token] *= 100
    elif case == "large negated token":
        keys[:, token] *= -100
    else:
        raise ValueError(f"difficult keys are one of {', '.join(DIFFICULT)}, not {case!r}")
    return dataclasses.replace(layer, keys=keys)
