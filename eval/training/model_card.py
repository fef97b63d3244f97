"""Write the reference model's card: what it is, how it was trained and what it reaches, from the recorded figures."""

import json
from pathlib import Path
from typing import Any

from pikv_hf.eval.training.curriculum import CURRICULUM, Stage

_TEMPLATE = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [qwen3_moe, kv-cache, synthetic]
---

# PiKV reference model

A Qwen3-MoE of 2.09 million parameters that looks up numbers and variables in synthetic text. It exists so that caches,
presses and evaluations can be tested and compared without a network or a GPU: it is small enough for a CPU and good
enough that losing the wrong part of the KV cache shows as a wrong answer. It knows {vocabulary} tokens and no language.

```python
from pikv_hf.eval.reference.load import load_reference_model

model, tokenizer = load_reference_model()
```

## Model

`Qwen3MoeForCausalLM`: hidden size 128, 4 layers, 8 query and 4 KV heads of 32 channels, 8 experts of which 2 are used
per token, expert width 128, `rope_theta` 1e5, 4,096 positions, tied embeddings, float32. Its KV cache takes 4,096
bytes per token of context. One token is a word, a digit, a newline or a punctuation mark.

SHA-256 of `model.safetensors`: `{sha256}`.

## Accuracy

Exact match / RULER string match in percent, {samples} samples per cell, full `DynamicCache`, greedy decoding, seed
{seed}. Lengths count the whole prompt and the expected answer.

{accuracy}

- single: one needle.
- multikey: one of 8 needles is asked for; in a haystack of needles, one of as many as fit.
- multivalue: four numbers of one key in order of appearance, and one other needle. An exact match needs the order, the
  string match does not.
- multiquery: four of 8 needles in one answer.
- vt: one chain of 5 variables (4 hops), asked backwards: the last variable is given and the chain to its value is the
  answer. Partial credit is easy here, so do not rank methods by its string match.

Experts: the entropy of the load is {balance} of the uniform distribution's in layers 1 to {layers}.

Measured on {date} with `{command}`;
Python {python}, torch {torch}, transformers {transformers}, {cores} CPU cores ({processor}), {threads} threads.

## Training data

Generated while training by `pikv_hf.eval.reference.synthetic` and `pikv_hf.eval.training.documents`: needles, questions
and chains of variables with RULER's wording, hidden in RULER's noise sentences, in sentences of random filler words, or
among other needles. Keys are 256 everyday nouns, numbers have four digits. There is no other text in it.

## Recipe

`python -m pikv_hf.eval.training.train --seed {train_seed}`: Muon (learning rate 0.02, momentum 0.95, weight decay
0.01) for the matrices inside layers except router gates, AdamW (2e-3; 1e-2 for q/k norms) for the rest, gradient norm
clipped to 1, constant rates with a linear decay to 5% in the last stage. The loss covers answers only: 2.0 on what
must be looked up, 1.5 on further digits, 0.5 on punctuation, 0.1 on the answer prefix; Switch load-balancing loss with
weight 0.01. Two single-threaded processes average their gradients.

{stages}

The first stage starts with 8 keys and doubles their number whenever recall exceeds 85%: in earlier trials with all keys
from the beginning, matching a key did not emerge within an hour. Once the pool has 64 keys, a fifth of the documents
are `variable_recall`. Lengths beyond those trained on are reached with skipped position ids (PoSE).

This checkpoint: {tokens:.1f} million tokens (padding included) in {steps:,} steps, {wall:.0f} minutes of wall time and
{cpu:.0f} minutes of CPU time over both processes, on two cores shared with other work, in {runs} run(s) of the script,
each continuing from the checkpoint of the one before.{notes}
"""


def write_model_card(folder: Path) -> None:
    """Write ``README.md`` from ``training.json``, ``accuracy.json`` and ``config.json`` in the model's ``folder``."""
    training, report, config = (
        json.loads((folder / name).read_text()) for name in ("training.json", "accuracy.json", "config.json")
    )
    shares = report["expert_entropy_share"]
    card = _TEMPLATE.format(
        **{name: report["versions"][name] for name in ("python", "torch", "transformers")},
        **{name: report["machine"][name] for name in ("cores", "processor", "threads")},
        seed=report["seed"],
        command=_repeating(report["command"]),
        date=report["date"][:10],
        vocabulary=config["vocab_size"],
        sha256=report["checkpoint_sha256"],
        samples=report["accuracy"][0]["samples"],
        accuracy=accuracy_table(report["accuracy"]),
        balance=" / ".join(f"{100 * share:.0f}%" for share in shares),
        layers=len(shares),
        train_seed=training["seed"],
        stages=_stages_table(CURRICULUM, training["stage_ends"]),
        tokens=training["tokens"] / 1e6,
        steps=training["step"],
        wall=training["wall_seconds"] / 60,
        cpu=training["cpu_seconds"] / 60,
        runs=training["runs"],
        notes="".join(f" {note}" for note in training.get("notes", ())),
    )
    (folder / "README.md").write_text(card)


def _repeating(recorded: str) -> str:
    """Return the command that repeats a measurement today: its record may be of when the module had another name."""
    _, space, arguments = recorded.partition(" --")
    return f"python -m pikv_hf.eval.training.evaluate{space}{arguments}"


def accuracy_table(cells: list[dict[str, Any]]) -> str:
    """Markdown table of ``exact / string match`` in percent: one row per task and haystack, one column per length."""
    lengths = list(dict.fromkeys(cell["length"] for cell in cells))
    rows: dict[str, list[str]] = {}
    for cell in cells:
        scores = f"{100 * cell['exact_match']:.0f} / {100 * cell['string_match']:.0f}"
        rows.setdefault(f"{cell['task']}, {cell['haystack']}", []).append(scores)
    return _markdown(["task, haystack", *(f"{length:,} tokens" for length in lengths)], rows)


def _stages_table(stages: tuple[Stage, ...], ends: list[int]) -> str:
    """Markdown table of the curriculum with the steps that each stage took."""
    rows = {}
    for stage, start, end in zip(stages, [0, *ends], ends, strict=False):
        shapes = ", ".join(f"{length} x {rows_}" for length, rows_ in stage.shapes)
        mix = ", ".join(f"{name} {share:g}" for name, share in stage.mix.items())
        pose = f"{stage.pose_share:.0%} up to {stage.pose_span:,}" if stage.pose_share else "none"
        rows[stage.name] = [shapes, str(end - start), mix, pose]
    return _markdown(["stage", "tokens x rows", "steps", "mix", "position skips"], rows)


def _markdown(header: list[str], rows: dict[str, list[str]]) -> str:
    """A Markdown table; keys are the first column."""
    lines = [header, ["---"] * len(header), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
