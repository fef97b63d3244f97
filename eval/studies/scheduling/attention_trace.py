"""Record the attention of each step by page, in every layer: traces from which any policy can be replayed."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.tasks.frame import frame
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.pages.usage_counters import ATTENTION_HALF_LIFE
from pikv_hf.scheduling.policies.registry import Floats, Integers, PageStats

#: Tokens per page, of the newest that no policy may touch, per chunk of the context, and in all after the context.
PAGE, WINDOW, CHUNK, DECODED = 16, 128, 128, 320
#: Tokens of other text between one answer and the next question, and queries that Quest's bounds are the mean of.
BETWEEN, RECENT_QUERIES = 64, 8

Bools = npt.NDArray[np.bool_]

_ATTENTION = "pikv_page_traces"


@dataclasses.dataclass(frozen=True)
class Trace:
    """Which of n pages attention used in each of S steps, in one layer.

    Attributes
    ----------
    born, newest, lane : numpy.ndarray
        `(n,)` int64, as in :class:`~pikv_hf.scheduling.policies.registry.PageStats`.
    shares, used : numpy.ndarray
        `(S, n)` float64 and bool: the share of the attention, and whether it was a use; nothing up to `born`.
    counted : int
        The first step whose uses count.
    bounds : numpy.ndarray, optional
        `(S, n)` float64, Quest's.
    """

    born: Integers
    newest: Integers
    lane: Integers
    shares: Floats
    used: Bools
    counted: int
    bounds: Floats | None = None

    @cached_property
    def known(self) -> Mapping[str, npt.NDArray[Any]]:
        """What a policy is told of a page, `(S, n)` each, after every step: it depends on no policy."""
        step = np.arange(len(self.shares))[:, None]
        uses = self.used.cumsum(0)
        last = np.maximum.accumulate(np.where(self.used, step, -1))
        before = np.vstack([np.full((1, last.shape[1]), -1), last[:-1]])
        recent = self.shares.copy()
        for row in range(1, len(recent)):
            recent[row] += recent[row - 1] * 0.5 ** (1 / ATTENTION_HALF_LIFE)
        return {
            "mass": self.shares.cumsum(0),
            "recent": recent,
            "last_use": np.where(uses > 0, last, self.born),
            "previous_use": np.maximum.accumulate(np.where(self.used, before, -1)),
            "uses": uses,
        }

    @cached_property
    def next_use(self) -> Integers:
        """The first counted step after a step in which a page is used, S if there is none, `(S, n)`."""
        steps = len(self.used)
        step = np.arange(steps)[:, None]
        uses = np.where(self.used & (step >= self.counted), step, steps)
        following = np.minimum.accumulate(uses[::-1])[::-1]
        return np.vstack([following[1:], np.full((1, following.shape[1]), steps)])

    @cached_property
    def future_mass(self) -> Floats:
        """The sum of the shares of the counted steps after a step, `(S, n)`."""
        shares = np.where(np.arange(len(self.shares))[:, None] >= self.counted, self.shares, 0)
        return shares.sum(0) - shares.cumsum(0)

    def view(self, step: int, pages: Integers) -> PageStats:
        """Return the statistics of `pages` after `step`."""
        return PageStats(
            step=step,
            born=self.born[pages],
            newest=self.newest[pages],
            tokens=np.full(len(pages), PAGE),
            lane=self.lane[pages],
            bounds=None if self.bounds is None else self.bounds[step, pages],
            **{name: values[step, pages] for name, values in self.known.items()},
        )


class Recorder:
    """Records traces of the bundled model."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_reference_model()

    def ids(self, text: str) -> torch.Tensor:
        """Return the tokens of a text, `(T,)` int64."""
        ids: torch.Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return ids

    def tokens(self, sample: EvalSample, other: EvalSample) -> tuple[torch.Tensor, int]:
        """Return context and DECODED further tokens, `(T,)` int64, and the length of the context."""
        before, between = frame(self.tokenizer)
        context = self.ids(before + sample.context)
        turn = self.ids(sample.question + between + sample.answer_prefix + sample.extra["exact"])
        text = self.ids(other.context).split(BETWEEN)
        turns = torch.cat([torch.cat([turn, part]) for part in text])[:DECODED]
        return torch.cat([context, turns]), len(context)

    @torch.inference_mode()
    def record(self, sample: EvalSample, other: EvalSample) -> dict[str, list[Trace]]:
        """Return the traces of all layers, with pages of all KV heads (`row`) and with pages of one (`head`)."""
        ids, context = self.tokens(sample, other)
        with _recording(self.model, partial(page_shares, steps=steps_of(context, len(ids)))) as layers:
            self.model.model(ids[None], use_cache=False)
        means = [(shares.mean(1, keepdims=True), bounds.mean(1, keepdims=True)) for shares, bounds in layers]
        return {
            "row": [_trace(*layer, context) for layer in means],
            "head": [_trace(*layer, context) for layer in layers],
        }


def steps_of(context: int, tokens: int) -> list[range]:
    """Return the positions of each step: chunks of the context, then single tokens."""
    chunks = [range(at, min(at + CHUNK, context)) for at in range(0, context, CHUNK)]
    return chunks + [range(at, at + 1) for at in range(context, tokens)]


def page_shares(query: torch.Tensor, key: torch.Tensor, scale: float, steps: Sequence[range]) -> tuple[Floats, Floats]:
    """Return how much of a layer's attention each page of PAGE tokens takes in each step, and Quest's bounds.

    Parameters
    ----------
    query, key : torch.Tensor
        `(Hq, T, D)` and `(H, T, D)` float32, after rotary embedding.
    scale : float
        Of the logits.
    steps : sequence of range
        S ranges of positions.

    Returns
    -------
    shares, bounds : numpy.ndarray
        `(S, H, T // PAGE)` float64, means over the query heads of a KV head and the queries of a step. Bounds are upper
        bounds of the logits of a page's tokens, for the RECENT_QUERIES queries up to the step's last.
    """
    heads, tokens, pages = len(key), key.shape[1], key.shape[1] // PAGE
    paged = key[:, : pages * PAGE].unflatten(1, (pages, PAGE))
    shares = np.zeros((len(steps), heads, pages))
    bounds = np.zeros((len(steps), heads, pages))
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for head, group in enumerate(query.unflatten(0, (heads, -1))):
        weights = torch.zeros(tokens, pages)
        bound = torch.zeros(tokens, pages)
        for each in group:
            full = (scale * each @ key[head].T).masked_fill_(hidden, -torch.inf).softmax(-1)
            weights += full[:, : pages * PAGE].unflatten(1, (pages, PAGE)).sum(-1) / len(group)
            top, bottom = paged[head].amax(1), paged[head].amin(1)
            bound += scale * (each.clamp(min=0) @ top.T + each.clamp(max=0) @ bottom.T) / len(group)
        for index, step in enumerate(steps):
            shares[index, head] = weights[step.start : step.stop].mean(0)
            bounds[index, head] = bound[max(0, step.stop - RECENT_QUERIES) : step.stop].mean(0)
    return shares, bounds


def _trace(shares: Floats, bounds: Floats, context: int) -> Trace:
    """Make a trace of what :func:`page_shares` found; the first page and the recent window are in no trace."""
    steps, heads, pages = shares.shape
    ends = np.array([step.stop for step in steps_of(context, context + DECODED)])
    newest = np.arange(1, pages) * PAGE + PAGE - 1
    # A page may go after the first step whose window no longer reaches it.
    born = np.searchsorted(ends, newest + 1 + WINDOW)
    kept, lane = np.tile(born < steps, heads), np.repeat(np.arange(heads), pages - 1)
    born, newest = np.tile(born, heads), np.tile(newest, heads)
    flat, limits = (part[:, :, 1:].reshape(steps, -1) for part in (shares, bounds))
    flat = np.where(np.arange(steps)[:, None] > born, flat, 0)
    read = -(-ends // PAGE)
    counted = len(steps_of(context, context))
    used = flat * read[:, None] >= 1
    return Trace(born[kept], newest[kept], lane[kept], flat[:, kept], used[:, kept], counted, limits[:, kept])


@contextmanager
def _recording(model: Any, measure: Callable[..., tuple[Floats, Floats]]) -> Iterator[list[tuple[Floats, Floats]]]:
    """Collect what `measure` finds in every layer's attention."""
    seen: list[tuple[Floats, Floats]] = []

    def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        seen.append(measure(query[0], key[0], module.scaling))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    AttentionInterface.register(_ATTENTION, attend)
    AttentionMaskInterface.register(_ATTENTION, lambda *rest, **more: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield seen
    finally:
        model.set_attn_implementation(before)
