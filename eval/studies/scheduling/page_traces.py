"""How well scheduling policies guess which pages attention wants next, against what could be known afterwards.

The bundled model reads a context in chunks, then, token by token, questions about it, their answers and other text
between them. The attention of each step is recorded by page. On these traces every policy manages a fast tier of a few
pages: a page that attention uses and that is not there is a miss, and loaded; what exceeds the tier then leaves. And it
manages a budget: pages that leave never return, and the attention that they would have had is lost.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console

from pikv_hf.eval.report.result_rows import percent, show_table, write_rows
from pikv_hf.eval.studies.scheduling.attention_trace import DECODED, PAGE, WINDOW, Recorder, Trace
from pikv_hf.eval.studies.scheduling.eviction_rules import RULES, Rule, by_policy, simulate
from pikv_hf.eval.tasks import reference
from pikv_hf.scheduling.policies.registry import make_policy

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
