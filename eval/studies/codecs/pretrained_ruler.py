"""What each codec costs a pretrained model in RULER's scores: contexts are read once, and answered from every codec.

Each batch of samples is kept with its scores as soon as it is measured: what was stopped goes on where it was.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.runner.caches import cache_factory
from pikv_hf.eval.runner.protocol import Asker, pad_left
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.tasks.ruler import generate, score
from pikv_hf.eval.tasks.sample import EvalSample

from ..routing.routing_study import interval
from .pretrained_perplexity import MAIN, cache_name
from .read_once import read_once

#: Those that SmolLM2-135M answers at these lengths.
TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multivalue")
#: Samples of a task that are read at once.
BATCH = 8
SEED = 42
METRIC = (
    "score: mean of RULER's score in percent over samples of the tasks, the question unseen when the context was "
    "packed; difference: to that of the codec none on the same samples, with half of its 95% interval, normal; "
    "agreement: share of answers that are the same text as with the codec none"
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Prompts of one length: samples of each task, and the codecs that they are asked of, beside none."""

    tokens: int
    samples: int
    codecs: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name for a file."""
        return f"ruler-{self.tokens}"


PARTS = (Part(1024, 8, MAIN),)


def measure(asker: Asker, part: Part, file: Path) -> Iterator[Row]:
    """Yield what every codec answers and scores for each sample; what the file has is not measured anew."""
    known = kept(file)
    samples = generate(asker.tokenizer, part.tokens, part.samples, tasks=TASKS, seed=SEED)
    # Some of each task, so that what was stopped has about as many of all.
    codecs = "none", *part.codecs
    for first in range(0, part.samples, BATCH):
        for task in range(len(TASKS)):
            batch = samples[task * part.samples :][first : min(first + BATCH, part.samples)]
            ids = {sample.id for sample in batch}
            done = {row["codec"]: row for row in known if ids == row["answers"].keys()}
            if missing := [codec for codec in codecs if codec not in done]:
                for row in measured(asker, batch, missing):
                    done[row["codec"]] = row
                    keep(file, [row])
            yield from (done[codec] for codec in codecs)


def measured(asker: Asker, batch: Sequence[EvalSample], codecs: Sequence[str]) -> Iterator[Row]:
    """Answer samples of one task with each codec, from one reading of their contexts."""
    encoded = [asker.encode(sample) for sample in batch]
    contexts, seen = pad_left([each.context for each in encoded], asker.tokenizer.pad_token_id or 0)
    prompt = read_once(asker.model, contexts, seen)
    for codec in codecs:
        cache = prompt.fill(cache_factory(cache_name(codec)).make(asker.model))
        answers = [asker.text_of(*pair) for pair in zip(encoded, asker.answer_batch(encoded, cache, seen), strict=True)]
        yield {
            "codec": codec,
            "task": batch[0].task,
            "answers": {sample.id: answer for sample, answer in zip(batch, answers, strict=True)},
            "scores": [
                100 * next(iter(score(sample, answer).values())) for sample, answer in zip(batch, answers, strict=True)
            ],
        }


def rows_of(part: Part, found: Sequence[Row]) -> list[Row]:
    """Summarise batches: a row for each codec."""
    by_codec: dict[str, list[tuple[float, str]]] = {}
    tasks: dict[str, dict[str, list[float]]] = {}
    for row in found:
        by_codec.setdefault(row["codec"], []).extend(zip(row["scores"], row["answers"].values(), strict=True))
        tasks.setdefault(row["codec"], {}).setdefault(row["task"], []).extend(row["scores"])
    rows = []
    for codec, pairs in by_codec.items():
        both = list(zip(pairs, by_codec["none"], strict=True))
        rows.append({
            "tokens": part.tokens,
            "codec": codec,
            "samples": len(pairs),
            "score": statistics.fmean(points for points, _ in pairs),
            "difference": statistics.fmean(mine[0] - exact[0] for mine, exact in both),
            "difference_ci": interval([mine[0] - exact[0] for mine, exact in both]),
            "agreement": statistics.fmean(mine[1] == exact[1] for mine, exact in both),
            "tasks": {name: statistics.fmean(points) for name, points in tasks[codec].items()},
        })  # fmt: skip
    return rows
