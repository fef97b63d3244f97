"""Compare ways to quantise pages of keys and values, by the error of attention; `eval/results/codec-schemes.json`.

The shipped format is compared with others of about its size, on the bundled model, on random models of larger
geometry, and on keys made difficult; and with the page guard, which stores a page that it cannot hold in a wider kind.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.codecs.page_encoder import GUARD
from pikv_hf.kernels.page_codes import CARRIED_ERROR

from ...report.result_rows import write_rows
from .attention_error import METRIC, PAGE, Subject, root_mean_square
from .page_guard import Guarded, guard_by_rule, guard_pages
from .quantisation_schemes import FLOATS, KEY_SCHEMES, KIND_OF_BITS, VALUE_SCHEMES, Scheme, Shipped
from .sample_kv import (
    DIFFICULT,
    GEOMETRIES,
    AttentionInput,
    difficult,
    pretrained_inputs,
    random_inputs,
    reference_inputs,
)
from .scheme_tables import Measured, show

BITS = (8, 4, 2)
#: The bundled model, in pages of consecutive tokens and in pages of one expert's tokens, as the cache has them.
REFERENCE, BY_EXPERT = "reference", "reference, pages by expert"
ORDINARY = "ordinary"
#: The shipped format with the page guard, and with the rule tried first: whether that judges values by deviation.
GUARDED, BY_DEVIATION = "shipped + guard", "shipped + guard, values by deviation"
GUARDS = {GUARDED: False, BY_DEVIATION: True}

#: Keys and values together.
PAIRS: dict[str, tuple[Scheme, Scheme]] = {
    "per channel | per token, groups of 32": (KEY_SCHEMES["per channel"], VALUE_SCHEMES["per token, groups of 32"]),
    "Hadamard, per token": (KEY_SCHEMES["Hadamard, per token"], VALUE_SCHEMES["Hadamard, per token"]),
    "shipped": (KEY_SCHEMES["shipped"], VALUE_SCHEMES["shipped"]),
}

#: Shares of a value's error to carry that are compared with the shipped one.
SHARES = (0.0, 0.25, CARRIED_ERROR, 0.5, 0.75, 1.0)

#: What is said of each layer of a pretrained model.
LAYERS_METRIC = (
    "keys_int4 and the like: error of the shipped format; widest_channel: root mean square of a KV head's widest "
    "channel over that of its median channel, of the worst head; first_token: norm of the first token's over the "
    "median norm, mean"
)

#: Bytes of a page beside keys and values: a position and an expert per token, and the counters of the page.
METADATA = PAGE * 6 + 17


def measure_scheme(subjects: Sequence[Subject], keys: Scheme | None, values: Scheme | None, bits: int) -> float:
    """Return the error over all subjects of schemes of keys, of values or of both."""
    return root_mean_square(
        [
            subject.error(
                None if keys is None else keys(subject.key_pages, bits),
                None if values is None else values(subject.value_pages, bits),
            )
            for subject in subjects
        ]
    )


def measure_guard(subjects: Sequence[Subject], part: str, bits: int, *, by_deviation: bool = False) -> dict[str, float]:
    """Return `error`, `moved`, `unpacked` and `largest` of the shipped format with the guard; see :class:`Measured`."""
    kind = KIND_OF_BITS[bits]
    errors: list[float] = []
    found: list[Guarded] = []
    for subject in subjects:
        keys: Guarded | None = None
        values: Guarded | None = None
        if part != "values":
            keys = guard_pages(subject.key_pages, kind, keys=True)
        if part != "keys" and by_deviation:
            values = guard_by_rule(subject.value_pages, kind, keys=False, centred=True)
        elif part != "keys":
            values = guard_pages(subject.value_pages, kind, keys=False)
        errors.append(subject.error(None if keys is None else keys.pages, None if values is None else values.pages))
        found += [guarded for guarded in (keys, values) if guarded is not None]
    kinds = [chosen for guarded in found for chosen in guarded.kinds]
    return {
        "error": root_mean_square(errors),
        "moved": sum(chosen != kind for chosen in kinds) / len(kinds),
        "unpacked": kinds.count("none") / len(kinds),
        "largest": max(guarded.largest for guarded in found),
    }


def measure_ordinary(data: str, subjects: Sequence[Subject]) -> Iterator[Measured]:
    """Measure every scheme on keys and values as they are."""
    for bits in BITS:
        for name, scheme in KEY_SCHEMES.items():
            yield Measured(data, ORDINARY, "keys", name, bits, measure_scheme(subjects, scheme, None, bits))
        for name, scheme in VALUE_SCHEMES.items():
            yield Measured(data, ORDINARY, "values", name, bits, measure_scheme(subjects, None, scheme, bits))
        for name, pair in PAIRS.items():
            yield Measured(data, ORDINARY, "both", name, bits, measure_scheme(subjects, *pair, bits))
        for part, (name, by_deviation) in itertools.product(("keys", "values", "both"), GUARDS.items()):
            if part != "keys" or not by_deviation:
                found = measure_guard(subjects, part, bits, by_deviation=by_deviation)
                yield Measured(data, ORDINARY, part, name, bits, **found)
    for name, (of_keys, of_values, bits) in FLOATS.items():
        yield Measured(data, ORDINARY, "keys", name, bits, measure_scheme(subjects, of_keys, None, bits))
        yield Measured(data, ORDINARY, "values", name, bits, measure_scheme(subjects, None, of_values, bits))
        yield Measured(data, ORDINARY, "both", name, bits, measure_scheme(subjects, of_keys, of_values, bits))


def measure_difficult(data: str, layers: Sequence[AttentionInput], ordinary: Sequence[Measured]) -> Iterator[Measured]:
    """Measure difficult keys: all schemes with 4 bits, the shipped one with all."""
    before = {(row.scheme, row.bits): row.error for row in ordinary if row.part == "keys"}
    for case in DIFFICULT:
        subjects = [Subject.of(difficult(layer, case)) for layer in layers]
        for bits, (name, scheme) in itertools.product(BITS, KEY_SCHEMES.items()):
            if bits == 4 or name == "shipped":
                error = measure_scheme(subjects, scheme, None, bits)
                yield Measured(data, case, "keys", name, bits, error, error / before[name, bits])
        for bits in BITS:
            found = measure_guard(subjects, "keys", bits)
            relative = found["error"] / before[GUARDED, bits]
            yield Measured(data, case, "keys", GUARDED, bits, relative=relative, **found)


def measure_shares(data: str, subjects: Sequence[Subject]) -> Iterator[Measured]:
    """Measure shares of a value's error that the next token takes over."""
    for bits, share in itertools.product(BITS, SHARES):
        error = measure_scheme(subjects, None, Shipped(keys=False, carried=share), bits)
        yield Measured(data, ORDINARY, "values", f"carried error {share:.2f}", bits, error)


def measure_layers(layers: Mapping[int, Sequence[Subject]]) -> Iterator[dict[str, Any]]:
    """Yield, of each layer of a model, how the shipped format and the channels' sizes look."""
    for index, subjects in layers.items():
        row: dict[str, Any] = {"layer": index}
        for bits in (4, 2):
            row[f"keys_int{bits}"] = measure_scheme(subjects, KEY_SCHEMES["shipped"], None, bits)
            row[f"values_int{bits}"] = measure_scheme(subjects, None, VALUE_SCHEMES["shipped"], bits)
        for part in ("keys", "values"):
            tokens = torch.cat([getattr(subject.layer, part) for subject in subjects], dim=1)
            channels = tokens.square().mean(1).sqrt()
            row[f"widest_channel_{part}"] = float((channels.amax(-1) / channels.median(-1).values).max())
            norms = torch.stack([getattr(subject.layer, part).norm(dim=-1) for subject in subjects])
            row[f"first_token_{part}"] = float((norms[:, :, 0] / norms.median(-1).values).mean())
        yield row


def measure_pretrained(name: str, tokens: int = 2048, windows: int = 2) -> tuple[list[Measured], list[dict[str, Any]]]:
    """Measure every scheme on keys and values of all layers of a pretrained model, and the shipped one layer by layer.

    Parameters
    ----------
    name : str
        As of `pikv eval --model`.
    tokens, windows : int
        Of prose and of code alike.
    """
    inputs = pretrained_inputs(name, tokens, windows)
    layers = {index: [Subject.of(layer) for layer in own] for index, own in inputs.items()}
    every = [subject for own in layers.values() for subject in own]
    return [*measure_ordinary(name, every), *measure_shares(name, every)], list(measure_layers(layers))


def page_sizes(page_size: int = PAGE, dim: int = 128, heads: int = 4) -> list[dict[str, Any]]:
    """Return bytes per page and head of every scheme, and their share of bf16.

    Rows of both keys and values hold the metadata of a page as well, divided among `heads` KV heads.
    """

    def row(part: str, scheme: str, bits: int, size: float) -> dict[str, Any]:
        whole = page_size * dim * 2 * (2 if part == "both" else 1)
        return {"part": part, "scheme": scheme, "bits": bits, "bytes": size, "share": size / whole}

    rows = []
    for part, schemes in (("keys", KEY_SCHEMES), ("values", VALUE_SCHEMES)):
        for bits, (name, scheme) in itertools.product(BITS, schemes.items()):
            rows.append(row(part, name, bits, scheme.page_bytes(bits, page_size, dim)))
    pairs = [(name, *pair, bits) for name, pair in PAIRS.items() for bits in BITS]
    for name, keys, values, bits in [*pairs, *((name, *given) for name, given in FLOATS.items())]:
        size = keys.page_bytes(bits, page_size, dim) + values.page_bytes(bits, page_size, dim)
        rows.append(row("both", name, bits, size + METADATA / heads))
    return rows


def measure(samples: int = 2, tokens: int = 1024, models: Sequence[str] = tuple(GEOMETRIES)) -> Iterator[Measured]:
    """Run the experiment.

    Parameters
    ----------
    samples : int
        Prompts of the bundled model per task.
    tokens : int
        Length of all prompts.
    models : sequence of str
        Which of :data:`~pikv_hf.eval.studies.codecs.sample_kv.GEOMETRIES`, beside the bundled model.
    """
    for name in (REFERENCE, *models):
        layers = reference_inputs(tokens, samples) if name == REFERENCE else random_inputs(name, tokens)
        subjects = [Subject.of(layer) for layer in layers]
        ordinary = list(measure_ordinary(name, subjects))
        yield from ordinary
        yield from measure_shares(name, subjects)
        yield from measure_difficult(name, layers, ordinary)
        if name == REFERENCE:
            yield from measure_ordinary(BY_EXPERT, [Subject.of(layer, by_expert=True) for layer in layers])


def main(argv: list[str] | None = None) -> None:
    """Run the experiment, print its tables and write its rows."""
    parser = argparse.ArgumentParser(
        prog="python -m pikv_hf.eval.studies.codecs.quantisation_schemes_study", description=__doc__
    )
    parser.add_argument("--output", type=Path, help="folder for codec-schemes.json")
    parser.add_argument("--samples", type=int, default=2, help="prompts of the bundled model per task")
    parser.add_argument("--model", help="a pretrained dense model instead: codec-schemes-MODEL.json")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(highlight=False)
    rows: list[Measured] = []
    layers: list[dict[str, Any]] = []
    about = {"metric": METRIC, "guard_limits": GUARD, "samples_per_task": arguments.samples}
    name = "codec-schemes"
    with torch.inference_mode(), console.status("measuring"):
        if arguments.model is None:
            rows.extend(measure(arguments.samples))
        else:
            rows, layers = measure_pretrained(arguments.model)
            name += f"-{Path(arguments.model).name}"
            about = {"metric": METRIC, "guard_limits": GUARD, "layers_metric": LAYERS_METRIC}
    sizes = page_sizes()
    show(console, rows, sizes)
    if arguments.output is not None:
        file = arguments.output / f"{name}.json"
        tables = {"sizes": sizes, "results": [dataclasses.asdict(row) for row in rows]}
        write_rows(file, about, tables | ({"layers": layers} if layers else {}))
        console.print(f"written to {file}", soft_wrap=True)


if __name__ == "__main__":
    main()
