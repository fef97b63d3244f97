"""What decides which tokens a press should keep, and in how many bits: RULER scores of rules at equal bytes.

The context is read once by the bundled model. Each rule gives every token of every lane (layer, KV head) a width from
what the prefill left behind; keys and values then go through the packed format, and the question, which no rule has
seen, is answered from them. Bytes are those of the pages, positions and host bytes included, against keys and values
in bf16.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console

from pikv_hf.allocation import eviction_loss as utility
from pikv_hf.allocation.bit_allocation import FULL, PageCost, allocate, pages_nbytes
from pikv_hf.allocation.recall import recall_mass
from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.studies.presses import attention_estimates as estimates
from pikv_hf.eval.studies.presses.press_simulator import PAGE, Model, Prefill, stored
from pikv_hf.eval.tasks import reference

QUERIES, AHEAD, LENGTH, SINKS = 64, 512, 1024, 4
BUDGETS = (0.5, 0.25, 0.125, 0.0625, 0.05, 0.025)
METRIC = "mean over tasks of RULER's score in percent; bytes of pages as a share of keys and values in bf16"

Losses = Mapping[int, torch.Tensor]


class Rules:
    """Ways to find the losses of one prefill, `(L, H, T)` each; a layer is a row of the batch for :mod:`utility`."""

    def __init__(self, model: Model, prefill: Prefill) -> None:
        self.model, self.prefill = model, prefill
        self.keys, self.values = prefill.keys, prefill.values
        self.tokens = self.keys.shape[2]
        self.spread = ((torch.arange(QUERIES) + 0.5) * self.tokens / QUERIES).long()
        self.even = torch.ones(self.keys.shape[:3])
        parts = zip(self.values, model.grams, strict=True)
        self.distance = torch.cat([utility.value_distance(value[None], gram) for value, gram in parts])
        self.norm = self.values.norm(dim=-1)

    def expected(self, *, rotated: bool = True) -> torch.Tensor:
        """Expected attention from queries all over the context, moved to its end and ahead or left where they are."""
        queries, ahead = self.prefill.queries[:, :, self.spread], None
        if rotated:
            queries = estimates.turn(queries, *self.model.angles(self.tokens - self.spread))
            ahead = estimates.mean_rotation(*self.model.angles(torch.arange(AHEAD)), queries.shape[-1])
        return estimates.expected_attention(queries, self.keys, scale=self.model.scale, ahead=ahead)

    def observed(self, *, last: bool) -> torch.Tensor:
        """Mean attention of the last queries, or of queries all over the context."""
        positions = torch.arange(self.tokens - QUERIES, self.tokens) if last else self.spread
        queries = self.prefill.queries[:, :, positions]
        return estimates.observed_mass(queries, positions, self.keys, scale=self.model.scale)

    def recalled(self) -> torch.Tensor:
        """The most attention that the context's own queries pay to each token when they are moved behind it."""
        cos, sin = self.model.angles(torch.full((self.tokens,), self.tokens - 1))
        moved = estimates.turn(self.keys, cos, -sin)
        return recall_mass(self.prefill.queries, self.keys, moved, self.model.scale)

    def shipped(self, probability: torch.Tensor, smoothing: float = utility.SMOOTHING) -> torch.Tensor:
        """Probability, partly spread evenly, times the squared distance of values behind the output projection.

        What shipped before :meth:`recalled` did, and still does where queries cannot be moved.
        """
        return utility.eviction_loss(probability, self.distance, smoothing=smoothing)

    def kvpress(self) -> torch.Tensor:
        """Expected attention times the norm of values, as much for every lane: kvpress's score on these queries."""
        score = self.expected() * self.norm
        return score / score.sum(-1, keepdim=True)

    def squared(self) -> torch.Tensor:
        """The mean squared effect of an eviction (arXiv 2605.08317): `p^2 / (1 - p)^2 |W (v - o)|^2`."""
        queries = self.prefill.queries[:, :, -QUERIES:].unflatten(1, (self.keys.shape[1], -1))
        logits = self.model.scale * queries @ self.keys.unsqueeze(2).transpose(-1, -2)
        hidden = torch.arange(self.tokens) > torch.arange(self.tokens - QUERIES, self.tokens)[:, None]
        p = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        out = p @ self.values.unsqueeze(2)
        grams = torch.stack(self.model.grams).unflatten(1, (self.keys.shape[1], -1))
        seen = self.values.unsqueeze(2)
        # |W (v - o)|^2 = v G v - 2 v G o + o G o
        of_values, of_outputs = ((seen @ grams) * seen).sum(-1), ((out @ grams) * out).sum(-1)
        between = (out @ grams) @ seen.transpose(-1, -2)
        squares = (of_values.unsqueeze(3) - 2 * between + of_outputs.unsqueeze(-1)).clamp(min=0)
        return (p.square() / (1 - p.clamp(max=0.9)).square() * squares).mean(3).sum(2)

    def importance(self) -> torch.Tensor:
        """How much outputs at queries all over the context owe to tokens outside of sinks and the last 32, `(L, H)`."""
        queries = self.prefill.queries[:, :, self.spread].unflatten(1, (self.keys.shape[1], -1))
        column, at = torch.arange(self.tokens), self.spread[:, None]
        logits = self.model.scale * queries @ self.keys.unsqueeze(2).transpose(-1, -2)
        p = logits.masked_fill(column > at, -torch.inf).softmax(-1)
        near = p * ((column < SINKS) | (column > at - 32))
        change = (p - near / near.sum(-1, keepdim=True)) @ self.values.unsqueeze(2)
        grams = torch.stack(self.model.grams).unflatten(1, (self.keys.shape[1], -1))
        return ((change @ grams) * change).sum(-1).mean(-1).sum(-1)

    def weighted(self, power: float) -> torch.Tensor:
        """The shipped losses, the sum of each lane moved towards its measured importance, geometrically."""
        loss = self.shipped(self.observed(last=True))
        return loss * (self.importance().unsqueeze(-1) / loss.sum(-1, keepdim=True)) ** power


def _widths(loss: torch.Tensor, ratios: Mapping[int, float]) -> Losses:
    return {width: loss * ratio for width, ratio in ratios.items()}


def _ratios(int2: float) -> dict[int, float]:
    return {
        width: ratio * (1.0 if width == 0 else int2 / utility.WIDTH_LOSS[2])
        for width, ratio in utility.WIDTH_LOSS.items()
    }


def _shipped(ratios: Mapping[int, float]) -> Callable[[Rules], Losses]:
    return lambda rules: _widths(rules.shipped(rules.observed(last=True)), ratios)


def _score(score: Callable[[Rules], torch.Tensor]) -> Callable[[Rules], Losses]:
    return lambda rules: _widths(score(rules), utility.WIDTH_LOSS)


#: What ships first, with its parts left out or replaced; what shipped before, likewise; then other methods.
RULES: dict[str, Callable[[Rules], Losses]] = {
    "recall": _score(lambda rules: utility.recall_loss(rules.recalled(), rules.distance)),
    "recall, distance squared": _score(lambda rules: rules.recalled() * rules.distance),
    "recall squared, distance squared": _score(lambda rules: rules.recalled().square() * rules.distance),
    "recall, no distance": _score(Rules.recalled),
    "recall smoothed, distance squared": _score(lambda rules: rules.shipped(rules.recalled())),
    "latest queries": _shipped(utility.WIDTH_LOSS),
    "half lane importance": _score(lambda rules: rules.weighted(0.5)),
    "lane importance": _score(lambda rules: rules.weighted(1.0)),
    "expected attention": _score(lambda rules: rules.shipped(rules.expected())),
    "attention of a spread sample": _score(lambda rules: rules.shipped(rules.observed(last=False))),
    "expected attention, queries not moved": _score(lambda rules: rules.shipped(rules.expected(rotated=False))),
    "no attention, distance alone": _score(lambda rules: rules.distance),
    "no distance": _score(lambda rules: rules.shipped(rules.observed(last=True)) / rules.distance.clamp(min=1e-9)),
    "value norm for distance": _score(
        lambda rules: utility.eviction_loss(rules.observed(last=True), rules.norm.square(), smoothing=utility.SMOOTHING)
    ),
    "no smoothing": _score(lambda rules: rules.shipped(rules.observed(last=True), 0.0)),
    "smoothing 0.8": _score(lambda rules: rules.shipped(rules.observed(last=True), 0.8)),
    "int2 loses 0.05": _shipped(_ratios(0.05)),
    "int2 loses 0.4": _shipped(_ratios(0.4)),
    "evict or int2": _shipped({0: 1.0, 2: 0.2, FULL: 0.2}),
    "evict or int4": _shipped({0: 1.0, 4: 0.012, FULL: 0.012}),
    "evict or full": _shipped({0: 1.0, FULL: 0.0}),
    "kvpress's score": _score(Rules.kvpress),
    "squared effect (RDKV)": _score(Rules.squared),
    "even": _score(lambda rules: rules.even),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One rule at one budget: shares of bytes allowed and used, mean score over tasks, and each task's, in percent.

    `lost` is the share of its losses that the rule expects to lose, as `PiKVPress(error_budget=...)` counts it.
    """

    rule: str
    budget: float
    used: float
    lost: float
    score: float
    tasks: Mapping[str, float]


@torch.inference_mode()
def measure(samples: int, seed: int, rules: Sequence[str], budgets: Sequence[float]) -> list[Measured]:
    """Run rules on `samples` contexts per task."""
    model = Model()
    found: dict[tuple[str, float], list[tuple[str, float, float, float]]] = {(r, b): [] for r in rules for b in budgets}
    for sample in reference.generate(LENGTH, samples, seed=seed):
        prefill = model.read(sample)
        known = Rules(model, prefill)
        losses = {rule: RULES[rule](known) for rule in rules}
        for budget in budgets:
            given = _allocated(losses, model.cost, budget, prefill)
            if not given:
                continue
            widths = torch.stack(list(given.values()))
            keys, values = stored(prefill, widths)
            scores = model.answer(prefill, keys, values, widths > 0)
            for (rule, each), score in zip(given.items(), scores, strict=True):
                used = pages_nbytes(each, model.cost) / prefill.full_bytes
                found[rule, budget].append((sample.task, used, _lost(losses[rule], each), score))
    return [_mean(rule, budget, rows) for (rule, budget), rows in found.items() if rows]


def _allocated(
    losses: Mapping[str, Losses], cost: PageCost, budget: float, prefill: Prefill
) -> dict[str, torch.Tensor]:
    """Return the widths of each rule; those whose narrowest page for every lane is beyond the budget are left out."""
    nbytes, lanes = int(budget * prefill.full_bytes), prefill.keys.shape[0] * prefill.keys.shape[1]
    able = {
        rule: of for rule, of in losses.items() if lanes * min(cost.nbytes[width] for width in of if width) <= nbytes
    }
    return {rule: allocate(of, cost, nbytes, sinks=SINKS) for rule, of in able.items()}


def _lost(losses: Losses, widths: torch.Tensor) -> float:
    lost = sum(float(loss[widths == width].sum()) for width, loss in losses.items())
    return lost / max(float(losses[0].sum()), 1e-30)


def _mean(rule: str, budget: float, rows: Sequence[tuple[str, float, float, float]]) -> Measured:
    tasks = {task: [score for of, *_, score in rows if of == task] for task, *_ in rows}
    means = {task: 100 * statistics.fmean(scores) for task, scores in tasks.items()}
    used, lost = statistics.fmean(row[1] for row in rows), statistics.fmean(row[2] for row in rows)
    return Measured(rule, budget, used, lost, statistics.fmean(means.values()), means)


def main(argv: list[str] | None = None) -> None:
    """Run the experiment, print its table and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.presses.score_search", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for press-search.json")
    parser.add_argument("--samples", type=int, default=20, help="contexts per task")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; `pikv eval` has 0")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), metavar="RULE", help="rules by name")
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS), help="shares of bf16's bytes")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(highlight=False)
    with console.status("measuring"):
        rows = measure(arguments.samples, arguments.seed, arguments.rules, arguments.budgets)
    columns = ["score (%) at bytes"] + [f"{100 * budget:.3g}%" for budget in arguments.budgets]
    scores = {(row.rule, row.budget): f"{row.score:.1f}" for row in rows}
    by_rule = [[rule, *(scores.get((rule, b), "-") for b in arguments.budgets)] for rule in arguments.rules]
    show_table(console, f"RULER, {LENGTH:,} tokens, {arguments.samples} samples per task", columns, by_rule)
    if arguments.output is not None:
        file = arguments.output / "press-search.json"
        about = {"metric": METRIC, "samples_per_task": arguments.samples, "seed": arguments.seed, "page_size": PAGE}
        write_rows(file, about, {"results": [dataclasses.asdict(row) for row in rows]})
        console.print(f"written to {file}", soft_wrap=True)


if __name__ == "__main__":
    main()
