"""How well scheduling policies guess which pages attention wants next, against what could be known afterwards.

The bundled model reads a context in chunks, then, token by token, questions about it, their answers and other text
between them. The attention of each step is recorded by page. On these traces every policy manages a fast tier of a few
pages: a page that attention uses and that is not there is a miss, and loaded; what exceeds the tier then leaves. And it
manages a budget: pages that leave never return, and the attention that they would have had is lost.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from transformers import AttentionInterface, AttentionMaskInterface

from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.report.result_rows import percent, show_table, write_rows
from pikv_hf.eval.tasks import reference
from pikv_hf.eval.tasks.frame import frame
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.scheduling.policies.registry import (
    HALF_LIFE,
    POLICIES,
    Floats,
    Integers,
    PageStats,
    SchedulingPolicy,
    leaving,
    make_policy,
)

#: Tokens per page, of the newest that no policy may touch, per chunk of the context, and in all after the context.
PAGE, WINDOW, CHUNK, DECODED = 16, 128, 128, 320
#: Tokens of other text between one answer and the next question, and queries that Quest's bounds are the mean of.
BETWEEN, RECENT_QUERIES = 64, 8
LENGTHS, CAPACITIES = (1024, 2048), (0.125, 0.25, 0.5)
TRAINING_SEED = 1
METRIC = (
    "tier: hit rate, used pages that were in the fast tier / used pages, over the decoded tokens; budget: attention in "
    "pages that had been evicted, mean over the decoded tokens. A page is used when it takes at least 1 / pages of the "
    "attention. Capacity is a share of the pages that may go. Each sample is the mean of its layers; mean and standard "
    "deviation over samples. pages: row, a page holds all KV heads; head, one KV head, all heads of a layer compete"
)
#: Options of `pikv` that were compared, on other samples than those of the tables: weights, then half-life.
OPTIONS = ("mass_weight", "recency_weight", "reuse_weight", "half_life")
CANDIDATES = (
    *((1, 0, 0, 8), (0, 1, 0, 8), (0, 0, 1, 8), (1, 1, 0, 8), (1, 0, 1, 8), (0, 1, 1, 8), (1, 1, 1, 8), (1, 1, 1, 64)),
    *((0, 5, 3, 8), (2, 5, 0, 8), (6, 5, 2, 8), (2, 5, 3, 8), (4, 5, 1, 8), (4, 5, 3, 8), (4, 5, 5, 8), (6, 5, 3, 8)),
    *((8, 5, 3, 8), (12, 5, 3, 8), (4, 5, 3, 4), (4, 5, 3, 16), (4, 5, 3, 32), (4, 5, 3, 64)),
)

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
            recent[row] += recent[row - 1] * 0.5 ** (1 / HALF_LIFE)
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


#: From a step, the pages that are there and how many of these have to go, to indices of those that go.
Rule = Callable[[int, Integers, int], Integers]


def by_policy(trace: Trace, policy: SchedulingPolicy) -> Rule:
    """Let a policy of the cache decide."""
    return lambda step, pages, excess: leaving(policy, trace.view(step, pages), excess * PAGE)


def belady(trace: Trace) -> Rule:
    """MIN (Belady, IBM Systems Journal 1966): the page that is used again last, or never, goes first."""
    return lambda step, pages, excess: np.argsort(-trace.next_use[step, pages], kind="stable")[:excess]


def future_mass(trace: Trace) -> Rule:
    """The page with the least attention still to come goes first: greedy, so a budget's optimum only nearly."""
    return lambda step, pages, excess: np.argsort(trace.future_mass[step, pages], kind="stable")[:excess]


def random_order(trace: Trace) -> Rule:
    """Any page goes, each as likely as any other."""
    draw = np.random.default_rng(0)
    return lambda step, pages, excess: draw.choice(len(pages), excess, replace=False)


#: What could be known afterwards, chance, and the policies.
RULES: dict[str, Callable[[Trace], Rule]] = {
    "belady": belady,
    "future_mass": future_mass,
    "random": random_order,
    "h2o, sums": lambda trace: by_policy(trace, make_policy("h2o", per_step=False)),
    **{name: partial(lambda name, trace: by_policy(trace, make_policy(name)), name) for name in POLICIES},
}


def simulate(trace: Trace, rule: Rule, capacity: int, *, returns: bool) -> tuple[int, int, float]:
    """Let a rule manage `capacity` pages.

    Parameters
    ----------
    trace : Trace
        Of n pages and S steps.
    rule : callable
        Asked after each step, when the attention of the step is known.
    capacity : int
        Pages that may stay.
    returns : bool
        Whether used pages that had left are loaded again (a tier) or are gone (a budget).

    Returns
    -------
    hits, misses, lost : int, int, float
        Over the counted steps: used pages that were there and that were not, and the sum of the shares of the attention
        that were not there.
    """
    here = np.zeros(len(trace.born), bool)
    hits, misses, lost = 0, 0, 0.0
    for step, used in enumerate(trace.used):
        if step >= trace.counted:
            hits += int((used & here).sum())
            misses += int((used & ~here).sum())
            lost += float(trace.shares[step, ~here].sum())
        if returns:
            here |= used
        here |= trace.born == step
        pages = here.nonzero()[0]
        if len(pages) > capacity:
            here[pages[rule(step, pages, len(pages) - capacity)]] = False
    return hits, misses, lost


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


def recordings(recorder: Recorder, length: int, samples: int, seed: int) -> Iterator[dict[str, list[Trace]]]:
    """Record `samples` samples of each task; the other text is that of the next one of the task."""
    for task in reference.TASKS:
        found = reference.generate(length, samples + 1, tasks=[task], seed=seed)
        for sample, other in pairwise(found):
            yield recorder.record(sample, other)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One rule at one capacity, mean and standard deviation over samples of hit rate and attention lost."""

    pages: str
    tokens: int
    capacity: float
    rule: str
    hit_rate: float
    hit_rate_spread: float
    lost: float
    lost_spread: float

    @classmethod
    def of(cls, key: tuple[str, int, float, str], pairs: Sequence[tuple[float, float]]) -> "Outcome":
        """Summarise the hit rates and losses of samples."""
        rates, losses = zip(*pairs, strict=True)
        spread = [statistics.stdev(part) if len(part) > 1 else 0.0 for part in (rates, losses)]
        return cls(*key, statistics.fmean(rates), spread[0], statistics.fmean(losses), spread[1])


def outcome(traces: Sequence[Trace], rule: Callable[[Trace], Rule], capacity: float) -> tuple[float, float]:
    """Return hit rate of a tier and attention lost of a budget, means over the layers of a sample."""
    rates, losses = [], []
    for trace in traces:
        room = max(1, round(capacity * len(trace.born)))
        hits, misses, _ = simulate(trace, rule(trace), room, returns=True)
        _, _, lost = simulate(trace, rule(trace), room, returns=False)
        rates.append(hits / max(hits + misses, 1))
        losses.append(lost / (len(trace.shares) - trace.counted) / (trace.lane.max() + 1))
    return statistics.fmean(rates), statistics.fmean(losses)


def measure(recorder: Recorder, length: int, samples: int, seed: int) -> list[Outcome]:
    """Run all rules on `samples` samples per task at one length."""
    found: dict[tuple[str, int, float, str], list[tuple[float, float]]] = {}
    for recorded in recordings(recorder, length, samples, seed):
        for pages, traces in recorded.items():
            for capacity in CAPACITIES:
                for name, rule in RULES.items():
                    pair = outcome(traces, rule, capacity)
                    found.setdefault((pages, length, capacity, name), []).append(pair)
    return [Outcome.of(key, pairs) for key, pairs in found.items()]


def compare_options(recorder: Recorder, samples: int) -> list[dict[str, float]]:
    """Compare options of `pikv` on samples of TRAINING_SEED, at a quarter of the pages of a row, the best first."""
    found: dict[tuple[float, ...], list[tuple[float, float]]] = {candidate: [] for candidate in CANDIDATES}
    for length in LENGTHS:
        for recorded in recordings(recorder, length, samples, TRAINING_SEED):
            for candidate, pairs in found.items():
                pairs.append(outcome(recorded["row"], partial(_with_options, candidate), 0.25))
    rows = []
    for candidate, pairs in found.items():
        rate, lost = (statistics.fmean(part) for part in zip(*pairs, strict=True))
        rows.append({**dict(zip(OPTIONS, candidate, strict=True)), "hit_rate": rate, "lost": lost})
    return sorted(rows, key=lambda row: row["lost"] - row["hit_rate"])


def _with_options(values: Sequence[float], trace: Trace) -> Rule:
    return by_policy(trace, make_policy("pikv", **dict(zip(OPTIONS, values, strict=True))))


def _show(console: Console, rows: Sequence[Outcome], length: int) -> None:
    for pages in ("row", "head"):
        for title, field in (("hit rate (%) of a tier", "hit_rate"), ("attention lost (%) by a budget", "lost")):
            cells = {
                (row.rule, row.capacity): f"{percent(getattr(row, field))} ± {percent(getattr(row, field + '_spread'))}"
                for row in rows
                if (row.pages, row.tokens) == (pages, length)
            }
            body = [[rule, *(cells[rule, capacity] for capacity in CAPACITIES)] for rule in RULES]
            columns = [f"{title} at pages", *(f"{100 * capacity:g}%" for capacity in CAPACITIES)]
            show_table(console, f"{length:,} tokens, pages of one {pages}", columns, body)


def main(argv: list[str] | None = None) -> None:
    """Run the experiment, print its tables and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.scheduling.page_traces", description=__doc__)
    parser.add_argument("--output", type=Path, help="file for the results, such as eval/results/page-traces.json")
    parser.add_argument("--samples", type=int, default=2, help="samples per task and length")
    parser.add_argument(
        "--seed", type=int, default=0, help=f"of the samples; the weights are compared on {TRAINING_SEED}"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    if arguments.seed == TRAINING_SEED:
        parser.error(f"--seed {TRAINING_SEED} is the one that the options of pikv are compared on")
    torch.set_num_threads(arguments.threads)
    console, recorder = Console(highlight=False), Recorder()
    rows: list[Outcome] = []
    with console.status("measuring"):
        options = compare_options(recorder, 1)
        for length in LENGTHS:
            rows += measure(recorder, length, arguments.samples, arguments.seed)
    for length in LENGTHS:
        _show(console, rows, length)
    if arguments.output is not None:
        about = {
            "metric": METRIC,
            "samples": len(reference.TASKS) * arguments.samples,
            "samples_per_task": arguments.samples,
            "seed": arguments.seed,
            "page_size": PAGE,
            "recent_window": WINDOW,
            "decoded_tokens": DECODED,
            "training": {"samples": len(LENGTHS) * len(reference.TASKS), "seed": TRAINING_SEED, "pages": "row"},
        }
        tables = {"results": [dataclasses.asdict(row) for row in rows], "options": options}
        write_rows(arguments.output, about, tables)
        console.print(f"written to {arguments.output}", soft_wrap=True)


if __name__ == "__main__":
    main()
