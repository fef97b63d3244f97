"""What a budget costs a pretrained model: given to the cache or to a press, the prompt read at once or in chunks.

The question comes after the context was read under the budget. Each batch of samples is kept as soon as it is measured:
what was stopped goes on where it was.
"""

import argparse
import contextlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.protocol import Asker, Encoded
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.studies.scheduling.budget_study import interval
from pikv_hf.eval.tasks.ruler import generate, score
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.presses import PiKVPress

Row = dict[str, Any]

#: Those that SmolLM2-135M answers at this length.
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue")
LENGTH, CHUNK = 2048, 512
#: Of the bytes in bfloat16, whatever the model computes in.
SHARES = (0.25, 0.125)
#: Of all caches: with a window what is never evicted would be more than the smaller share in float32.
OPTIONS: dict[str, Any] = {"placement": "hash", "recent_window": 0}
#: Samples of a task that are read at once.
BATCH = 4
METRIC = (
    "score: mean over tasks of RULER's score in percent, question unseen; difference: from PiKVPress with the same "
    "share, paired by sample, and from the full cache; shares are those of the bytes that keys and values take in "
    "bfloat16; held: bytes of the cache when the context has been read, as such a share. Intervals are 95%, normal, "
    "over samples"
)


class Way(NamedTuple):
    """How a context is read: under a share of the tokens' bytes or none, that of a press or the cache's own."""

    kind: str
    share: float | None = None
    scheduler: str | None = None
    chunk: int | None = None

    @property
    def name(self) -> str:
        """A name for rows."""
        chunked = "" if self.chunk is None else f" in chunks of {self.chunk}"
        return self.kind if self.share is None else f"{self.kind} {100 * self.share:g}%{chunked}"


def ways(pages: bool) -> list[Way]:
    """Return the ways that are compared; `pages` adds the scheduler of pages that a budget had by default before."""
    found = []
    for share in SHARES:
        found += [Way("press", share), Way("budget", share), Way("budget", share, None, CHUNK)]
        found += [Way("pages", share, "pikv")] if pages else []
    return [*found, Way("full")]


class Reader:
    """Reads batches of contexts in one way after another and answers their questions."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.asker = Asker(model, tokenizer)
        self.model = model

    @torch.no_grad()
    def measured(self, batch: Sequence[EvalSample], way: Way) -> list[Row]:
        """Return a row for each sample: its score, and what the cache held of the context."""
        encoded = [self.asker.encode(sample) for sample in batch]
        options = dict(OPTIONS)
        share = None if way.share is None else way.share * torch.bfloat16.itemsize / self.model.dtype.itemsize
        if way.kind in ("budget", "pages"):
            options |= {"budget": share, "scheduler": way.scheduler}
        cache = PiKVCache.for_model(self.model, **options)
        press = PiKVPress(compression_ratio=1 - share) if way.kind == "press" and share else None
        with press(self.model) if press is not None else contextlib.nullcontext():
            seen = self.read(encoded, cache, way.chunk)
        held = cache.nbytes / self._bytes_of(int(seen.sum()))
        answers = self.asker.answer_batch(encoded, cache, seen)
        return [
            {
                "id": sample.id,
                "task": sample.task,
                "way": way.name,
                "score": 100 * next(iter(score(sample, self.asker.text_of(own, tokens)).values())),
                "held": held,
            }
            for sample, own, tokens in zip(batch, encoded, answers, strict=True)
        ]

    def read(self, encoded: Sequence[Encoded], cache: PiKVCache, chunk: int | None) -> torch.Tensor:
        """Read contexts in one call or in chunks; return which columns hold a token, `(B, T)`."""
        if chunk is None:
            return self.asker.read_batch(encoded, cache)
        given = self.asker.prompt(encoded, query_aware=False)
        ids = given["input_ids"]
        mask = given.get("attention_mask", torch.ones_like(ids))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for first in range(0, ids.shape[1], chunk):
            part = slice(first, first + chunk)
            self.model.model(
                input_ids=ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=positions[:, part],
                **cache_argument(cache),
            )
        return mask

    def _bytes_of(self, tokens: int) -> int:
        """Return what keys and values of so many tokens take in bfloat16."""
        config = self.model.config.get_text_config(decoder=True)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * dim
        return tokens * numbers * torch.bfloat16.itemsize


def rows_of(measured: Sequence[Row], compared: Sequence[Way]) -> list[Row]:
    """Summarise rows of samples: a row for each way."""
    scores = {way.name: {row["id"]: row["score"] for row in measured if row["way"] == way.name} for way in compared}
    rows = []
    for way in compared:
        own = scores[way.name]
        if not own:
            continue
        row: Row = {"way": way.name, "kind": way.kind, "share": way.share, "chunk": way.chunk, "samples": len(own)}
        held = [each["held"] for each in measured if each["way"] == way.name]
        row |= {"held": statistics.fmean(held), "score": statistics.fmean(own.values())}
        row["score_ci"] = interval(list(own.values()))
        for name, other in (("full", scores["full"]), ("press", scores.get(f"press {100 * (way.share or 0):g}%", {}))):
            both = [own[each] - other[each] for each in own if each in other]
            if both and name != way.kind:
                row |= {f"minus_{name}": statistics.fmean(both), f"minus_{name}_ci": interval(both)}
        tasks = {
            each: [row["score"] for row in measured if (row["way"], row["task"]) == (way.name, each)] for each in TASKS
        }
        row["tasks"] = {task: statistics.fmean(found) for task, found in tasks.items() if found}
        rows.append(row)
    return rows


def _show(console: Console, rows: Sequence[Row]) -> None:
    cells = [
        [
            row["way"],
            str(row["samples"]),
            f"{100 * row['held']:.1f}",
            f"{row['score']:.1f} ± {row['score_ci']:.1f}",
            *(
                f"{row[name]:+.1f} ± {row[name + '_ci']:.1f}" if name in row else ""
                for name in ("minus_full", "minus_press")
            ),
        ]
        for row in rows
    ]
    columns = ["", "samples", "held (%)", "score", "- full", "- press"]
    show_table(console, f"RULER at {LENGTH:,} tokens, question unseen", columns, cells)


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder or a name, as of pikv eval")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--samples", type=int, default=4, help="samples per task")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--pages", action="store_true", help="also the scheduler of pages")
    parser.add_argument("--parts", type=Path, required=True, help="file to keep samples in; those there are taken")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, reader = Console(highlight=False), Reader(*load_model(arguments.model, arguments.dtype))
    given = {"tasks": TASKS, "seed": arguments.seed}
    samples = generate(reader.asker.tokenizer, LENGTH, arguments.samples, **given)
    measured, compared = kept(arguments.parts), ways(arguments.pages)
    # Those that lose most come first.
    batches = [
        samples[task * arguments.samples :][first : min(first + BATCH, arguments.samples)]
        for first in range(0, arguments.samples, BATCH)
        for task in reversed(range(len(TASKS)))
    ]
    # All of a share before the next one: what was stopped can be compared as far as it goes.
    for share in SHARES:
        for batch in batches:
            for way in (each for each in compared if each.share in (None, share)):
                if any((row["id"], row["way"]) == (batch[0].id, way.name) for row in measured):
                    continue
                rows = reader.measured(batch, way)
                keep(arguments.parts, rows)
                measured += rows
                console.print(f"{way.name}, {batch[0].task}: {[row['score'] for row in rows]}", soft_wrap=True)
    rows = rows_of(measured, compared)
    if arguments.output is not None:
        about = {"metric": METRIC, "length": LENGTH, "options": OPTIONS, "dtype": arguments.dtype, "tasks": list(TASKS)}
        write_rows(arguments.output, {**about, "seed": arguments.seed, "model": str(arguments.model)}, {"ruler": rows})
    _show(console, rows)


if __name__ == "__main__":
    main()
