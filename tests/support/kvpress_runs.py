"""Running a press through kvpress's pipeline, and a slow attention where kvpress's own is no reference."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from kvpress_cases import PressCase, build_model
from transformers import AttentionInterface, AutoTokenizer, DynamicCache, pipeline
from transformers.masking_utils import AttentionMaskInterface

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.eval.reference.load import reference_model_path

NEW_TOKENS = 6
#: So small that a few hundred tokens fill many pages.
OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 32, "num_shards": 4}


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of a context and its questions.

    Attributes
    ----------
    answers : list of str
        One for each question.
    logits : torch.Tensor
        `(steps, V)`, of all answers one after another.
    lengths : list of int
        Of each layer, when all answers are out of the cache again.
    marked : list of int
        Marks that the press left on each layer's attention module, evicted tokens times KV heads.
    """

    answers: list[str]
    logits: torch.Tensor
    lengths: list[int]
    marked: list[int]


@functools.cache
def the_tokenizer() -> Any:
    """Return the bundled model's tokenizer."""
    return AutoTokenizer.from_pretrained(reference_model_path(), local_files_only=True)


@functools.cache
def _shared_model(architecture: str, attention: str, attached: bool) -> Any:
    return build_model(architecture, attention)


def model_for(architecture: str, case: PressCase | None = None, how: str = "pikv") -> Any:
    """Return a model with the weights of its architecture, whichever way it attends.

    Parameters
    ----------
    architecture : str
        One of `ARCHITECTURES`.
    case : PressCase, optional
        A press that changes the model gets one of its own.
    how : str
        `"pikv"` to attach it, or an attention implementation; a model of the one kind is never used for the other.
    """
    register_slow_attention()
    attention = "sdpa" if how == "pikv" else how
    if case is not None and case.changes_model:
        return build_model(architecture, attention)
    model = _shared_model(architecture, attention, how == "pikv")
    if how != "pikv":
        # In eager attention, which it does not wrap, kvpress leaves the marks of an earlier prompt where they are.
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
    return model


def attached_cache(model: Any, **options: Any) -> PiKVCache:
    """Return a cache that the model reads in place."""
    placement = "expert" if hasattr(model.config, "num_experts") else "hash"
    return PiKVCache.for_model(model, **{"placement": placement, **OPTIONS, **options})


def dense_cache(model: Any, **options: Any) -> PiKVCache:
    """Return a cache that any attention implementation reads as dense tensors."""
    return PiKVCache(model.config, PiKVConfig(**{**OPTIONS, **options}))


def ask(
    model: Any, cache: Any, press: Any, context: str, questions: Sequence[str], new_tokens: int = NEW_TOKENS
) -> Run:
    """Ask by kvpress's pipeline: the context is read once, through the press, and each question on its own."""
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=the_tokenizer(), device="cpu")
    torch.manual_seed(0)
    with _recorded(model) as steps:
        output = pipe(context, questions=list(questions), press=press, cache=cache, max_new_tokens=new_tokens)
    return Run(output["answers"], torch.cat(steps), lengths_of(cache), marks(model))


def ask_reference(architecture: str, case: PressCase, context: str, questions: Sequence[str]) -> Run:
    """Ask with a `DynamicCache`, in slow attention where kvpress needs it to be right."""
    attention = "slow" if case.ragged_layers or case.head_wise else case.attention
    model = model_for(architecture, case, attention)
    press = case.make(model, the_tokenizer())
    return ask(model, DynamicCache(), press, context, questions)


def slow_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Attend causally among as many tokens as this layer has, to none that kvpress marks as evicted; no padding.

    `DynamicCache` needs it where kvpress alone fails, because layers differ in length, or is only nearly right: its
    fake keys leave evicted tokens some weight.
    """
    (queries, dim), tokens, groups = query.shape[2:], key.shape[2], query.shape[1] // key.shape[1]
    if queries == tokens:
        module.masked_key_indices = None
    seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).repeat(*key.shape[:2], 1, 1)
    if (marked := getattr(module, "masked_key_indices", None)) is not None:
        rows, heads, positions = marked
        seen[rows, heads, :, positions] = False
    key, value, seen = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value, seen))
    logits = query @ key.mT * kwargs.get("scaling", dim**-0.5)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


def register_slow_attention() -> None:
    """Let a model have `attn_implementation="slow"`."""
    AttentionInterface.register("slow", slow_attention)
    AttentionMaskInterface.register("slow", lambda *args, **kwargs: None)


def assert_same(run: Run, reference: Run, tolerance: float = 1e-4) -> None:
    """Compare answers, lengths and logits; the tolerance is in units of the largest logit."""
    assert run.answers == reference.answers
    assert run.lengths == reference.lengths
    assert_close(run.logits, reference.logits, tolerance)


def assert_close(logits: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Compare logits; the tolerance is in units of the largest."""
    assert logits.shape == reference.shape
    error = (logits - reference).abs().max() / reference.abs().max()
    assert error <= tolerance, f"logits differ by {error:.2g} of the largest"


def lengths_of(cache: Any) -> list[int]:
    """Return the length of each layer."""
    return [cache.get_seq_length(index) for index in range(len(cache))]


def marks(model: Any) -> list[int]:
    """Return how many evicted tokens each attention module is marked with."""
    found = (getattr(layer.self_attn, "masked_key_indices", None) for layer in model.model.layers)
    return [0 if indices is None else len(indices[0]) for indices in found]


@contextmanager
def _recorded(model: Any) -> Iterator[list[torch.Tensor]]:
    """Record the logits of every step, `(1, V)`; reading the context makes none."""
    steps: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: steps.append(output[0, -1:].clone()))
    try:
        yield steps
    finally:
        handle.remove()
