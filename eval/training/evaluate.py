"""Measure the reference model: ``python -m pikv_hf.eval.training.evaluate``.

Accuracy per task and context length on fresh samples, full ``DynamicCache``, and how evenly the router spreads tokens
over experts. Writes ``accuracy.json`` and the model card into the model's folder.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.provenance import provenance
from pikv_hf.eval.reference.load import DIGESTS, load_reference_model, reference_model_path
from pikv_hf.eval.reference.synthetic import Sample, count_tokens, make_sample
from pikv_hf.eval.training.model_card import accuracy_table, write_model_card

#: The rows of the accuracy table: task and kind of haystack.
ROWS: tuple[tuple[str, str], ...] = (
    ("single", "noise"),
    ("single", "essay"),
    ("multikey", "essay"),
    ("multikey", "needles"),
    ("multivalue", "essay"),
    ("multiquery", "essay"),
    ("vt", "noise"),
)
LENGTHS = (512, 1024, 2048)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Scores of one task at one length: shares in [0, 1] over ``samples``; ``seconds`` is wall time."""

    task: str
    haystack: str
    length: int
    samples: int
    exact_match: float
    string_match: float
    seconds: float


def evaluation_samples(task: str, haystack: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` samples, each drawn from a generator of its own that training never uses."""
    return [
        make_sample(task, length, random.Random(f"evaluation {seed} {task} {haystack} {length} {index}"), haystack)
        for index in range(count)
    ]


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> list[str]:
    """Greedy continuations of the samples' prompts, as one left-padded batch with a full ``DynamicCache``."""
    batch = tokenizer([sample.prompt for sample in samples], padding=True, return_tensors="pt")
    # A wrong answer may be longer than the expected one, but nothing after the expected length can make it right.
    limit = max(count_tokens(sample.answer) for sample in samples) + 2
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        **cache_argument(DynamicCache(config=model.config)),
        max_new_tokens=limit,
        do_sample=False,
    )
    return tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Sample],
    length: int,
    batch_size: int = 16,
) -> Accuracy:
    """Exact match and RULER string match of one row of the table."""
    start = time.perf_counter()
    outputs: list[str] = []
    for index in range(0, len(samples), batch_size):
        outputs += answer(model, tokenizer, samples[index : index + batch_size])
    pairs = list(zip(samples, outputs, strict=True))
    return Accuracy(
        samples[0].task,
        samples[0].haystack,
        length,
        len(samples),
        sum(sample.exact(output) for sample, output in pairs) / len(pairs),
        sum(sample.string_match(output) for sample, output in pairs) / len(pairs),
        round(time.perf_counter() - start, 2),
    )


@contextmanager
def count_expert_loads(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Count how often each expert is chosen while the context is open.

    Yields
    ------
    list[Tensor]
        Per layer ``[E]`` int64 counts, updated in place.
    """
    gates = [layer.mlp.gate for layer in model.model.layers]
    loads = [torch.zeros(gate.weight.shape[0], dtype=torch.int64) for gate in gates]

    def hook(layer: int, gate: Any, inputs: tuple[Tensor, ...]) -> None:
        # From the weights: which of its outputs a router returns in which form depends on the transformers release.
        scores = torch.nn.functional.linear(inputs[0].flatten(0, -2), gate.weight)
        loads[layer] += torch.bincount(scores.topk(gate.top_k).indices.flatten(), minlength=len(loads[layer]))

    handles = [
        gate.register_forward_hook(lambda gate, inputs, _, layer=layer: hook(layer, gate, inputs))
        for layer, gate in enumerate(gates)
    ]
    try:
        yield loads
    finally:
        for handle in handles:
            handle.remove()


def entropy_share(load: Tensor) -> float:
    """Entropy of the expert load ``[E]`` as a share of the uniform distribution's, in [0, 1]; 1 is balanced."""
    return torch.special.entr(load / load.sum()).sum().item() / math.log(len(load))


@torch.inference_mode()
def expert_balance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]
) -> list[float]:
    """Entropy share of the expert load per layer over the samples' prompts, one by one (no padding)."""
    with count_expert_loads(model) as loads:
        for sample in samples:
            model.model(**tokenizer(sample.prompt, return_tensors="pt"), use_cache=False)
    return [entropy_share(load) for load in loads]


def main(argv: list[str] | None = None) -> None:
    """Measure the bundled checkpoint, print the table and update the model's folder."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.training.evaluate", description=__doc__)
    parser.add_argument("--samples", type=int, default=64, help="per task and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    model, tokenizer = load_reference_model()
    cells = [(row, length) for length in arguments.lengths for row in ROWS]
    results = [
        measure(model, tokenizer, evaluation_samples(*row, length, arguments.samples, arguments.seed), length)
        for row, length in track(cells, "Measuring accuracy", console=Console(stderr=True))
    ]
    lengths = " ".join(map(str, arguments.lengths))
    command = f"{parser.prog} --samples {arguments.samples} --lengths {lengths} --seed {arguments.seed}"
    mixed = [sample for row in ROWS for sample in evaluation_samples(*row, 1024, 8, arguments.seed)]
    report: dict[str, Any] = {
        **provenance(command),
        "checkpoint_sha256": (reference_model_path() / DIGESTS).read_text().split()[0],
        "seed": arguments.seed,
        "accuracy": [asdict(result) for result in results],
        "expert_entropy_share": [round(share, 4) for share in expert_balance(model, tokenizer, mixed)],
    }
    folder = reference_model_path()
    (folder / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n")
    write_model_card(folder)
    print(accuracy_table(report["accuracy"]))


if __name__ == "__main__":
    main()
