"""A record of LongBench, files of records and of prompts, and the prompt that a sample makes."""

import json
from pathlib import Path
from typing import Any

from pikv_hf.eval.tasks.sample import EvalSample

RECORD = {
    "input": "Who steers?",
    "context": "Odile steers the ferry.",
    "answers": ["Odile"],
    "length": 7,
    "dataset": "narrativeqa",
    "language": "en",
    "all_classes": None,
    "_id": "0f",
}


def prompt_of(sample: EvalSample) -> str:
    """The whole prompt as kvpress's pipeline puts it together for a tokenizer without chat template."""
    return f"{sample.context}{sample.question}\n{sample.answer_prefix}"


def write_lines(folder: Path, *entries: Any, name: str = "narrativeqa.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return folder


def write_prompts(path: Path, **prompts: Any) -> Path:
    path.write_text(json.dumps(prompts), encoding="utf-8")
    return path
