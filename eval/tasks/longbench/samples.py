"""Turn LongBench into evaluation samples, and score their answers.

Source: LongBench (Bai et al., 2023), `pred.py` and `eval.py`.
"""

import functools
from collections.abc import Collection
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pikv_hf.eval.metrics import SampleMetric, make_metric
from pikv_hf.eval.tasks.longbench.fit import fit
from pikv_hf.eval.tasks.longbench.records import Record, read_records
from pikv_hf.eval.tasks.longbench.sets import SETS, LongBenchSet, find_sets
from pikv_hf.eval.tasks.longbench.templates import PromptTemplate, load_templates
from pikv_hf.eval.tasks.sample import EvalSample, Scores

#: Words or characters at which LongBench-E's buckets end.
BUCKETS = {"0-4k": 4000, "4-8k": 8000}
LAST_BUCKET = "8k+"


def bundled_sample() -> Path:
    """Return the folder with two or three short samples of every set, written for this project."""
    return Path(__file__).parent / "data"


def load(
    sets: Collection[str],
    *,
    data_dir: Path | None = None,
    e: bool = False,
    prompts: Path | None = None,
    limit: int | None = None,
    max_context: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[EvalSample]:
    """Load sets in the order given, samples in the order of the data.

    Parameters
    ----------
    sets : collection of str
        Names in `SETS`, or `SETS_E` for LongBench-E.
    data_dir : Path, optional
        Folder with the official `.jsonl` files; by default they come from the Hub. `bundled_sample()` needs no network.
    e : bool
        LongBench-E.
    prompts : Path, optional
        The official `dataset2prompt.json`; by default our own wording.
    limit : int, optional
        Samples of each set, from the first; the rest of the file is not read.
    max_context : int, optional
        Tokens of the whole prompt as kvpress's pipeline reads it. A longer one is cut in the middle of its context.
    tokenizer : PreTrainedTokenizerBase, optional
        Counts these tokens.

    Raises
    ------
    FileNotFoundError
        For missing data or prompts.
    ValueError
        For unknown sets, wrong data or prompts, a limit below 1, or `max_context` without tokenizer or too small.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if max_context is not None and tokenizer is None:
        raise ValueError(f"max_context of {max_context} needs a tokenizer to count with, got none")
    entries = find_sets(sets, e=e)
    templates = load_templates(entries, prompts)
    samples = []
    for entry in entries:
        for index, record in enumerate(read_records(entry, data_dir, e=e, limit=limit)):
            sample = make_sample(entry, index, record, templates[entry.name])
            samples.append(sample if max_context is None else fit(sample, tokenizer, max_context))
    return samples


def make_sample(entry: LongBenchSet, index: int, record: Record, template: PromptTemplate) -> EvalSample:
    """Fill a template with a record, the one at `index` of its set."""
    parts = template.fill(record.context, record.input, entry)
    return EvalSample(
        id=f"{entry.name}-{index:04d}",
        task=entry.name,
        context=parts.context,
        question=parts.question,
        answer_prefix=parts.answer_prefix,
        answers=record.answers,
        max_new_tokens=entry.max_new_tokens,
        length=record.length,
        extra={
            "all_classes": None if record.all_classes is None else list(record.all_classes),
            "language": record.language,
            "source_id": record.id,
        },
    )


def score(sample: EvalSample, prediction: str) -> Scores:
    """Score an answer with the metric of its set, as one entry named after it.

    Of the few-shot sets only the first line counts. Blanks and empty lines before it are skipped (as in kvpress;
    `eval.py` skips empty lines only, so an answer that begins with a blank line holding a space is empty to it).
    """
    entry = SETS[sample.task]
    if entry.few_shot:
        prediction = prediction.lstrip().split("\n")[0]
    value = _metric(entry.metric).score(prediction, sample.answers, all_classes=sample.extra["all_classes"])
    return {entry.metric: value}


def bucket(sample: EvalSample) -> str:
    """Return LongBench-E's group of a sample by its length: `0-4k` below 4,000, `4-8k` below 8,000, `8k+`."""
    return next((name for name, end in BUCKETS.items() if sample.length < end), LAST_BUCKET)


@functools.cache
def _metric(name: str) -> SampleMetric:
    return make_metric(name)
