"""Which codec for latents, and which for their rotary keys: errors of attention, and bytes per token.

Run as `python -m pikv_hf.eval.studies.codecs.latent_codecs --output eval/results`.

In latent attention (MLA) a cached token is one latent, which is key and value of all heads at once, and one rotary key.
`key_codec` packs latents, `value_codec` rotary keys. An error in a latent channel is an error of every head.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from pikv_hf.codecs.page_encoder import PageEncoder
from pikv_hf.common.kv import KV
from pikv_hf.config import PiKVConfig

from ...report.result_rows import percent, show_table, write_rows
from .attention_error import PAGE, WINDOW, root_mean_square
from .latent_inputs import CASES, HEADS, LATENT, ROTARY, LatentInput, latent_input
from .latent_logits import ModelError, model_errors

METRIC = (
    "error: ||attention output - exact attention output|| / ||exact attention output|| (Frobenius, over the heads and "
    "last 32 queries of a layer), root mean square over seeds; worst_head: the same of the worst head; models: "
    "relative error of the logits of 8 steps after a prompt; pages of 32 tokens; the first page, the last 128 tokens "
    "and what fills no page stay exact; bytes: of codes, per token in full pages, of bf16 tokens"
)

#: Codecs of latents and of rotary keys that are measured together.
PAIRS: tuple[tuple[str, str], ...] = (
    *itertools.product(("none", "int8", "int4", "int2", "fp8"), ("none", "int8", "int4", "fp8")),
    ("none", "int2"),
    ("int2", "int2"),
    ("lowrank", "none"),
    ("lowrank+int4", "none"),
)

#: Of a codec that has one range for all channels of a token, which PiKV has not: what an outlier does to it.
PER_TOKEN = {"int8": 255, "int4": 15}


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One row of the results.

    Attributes
    ----------
    case : str
        Of :data:`~pikv_hf.eval.studies.codecs.latent_inputs.CASES`.
    latents, rotary : str
        The codecs.
    error, worst_head : float
        See :data:`METRIC`.
    bytes : float, optional
        Per token; None of what is shown for comparison alone.
    moved : float, optional
        Share of the pages of latents that their guard stored in a wider kind.
    moved_rotary : float, optional
        The same of rotary keys.
    """

    case: str
    latents: str
    rotary: str
    error: float
    worst_head: float
    bytes: float | None = None
    moved: float | None = None
    moved_rotary: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Read:
    """Tokens `(T, D)` as they are read back, their bytes, and the share of pages that went to a wider kind."""

    tokens: torch.Tensor
    bytes: float
    moved: float


def _coded(tokens: torch.Tensor, codec: str, which: KV) -> _Read:
    """Encode whole pages between the first page and the window as a cache does, and decode them."""
    pages = slice(PAGE, PAGE + max(0, len(tokens) - PAGE - WINDOW) // PAGE * PAGE)
    read, stored = tokens.clone(), tokens[pages].bfloat16().unflatten(0, (-1, PAGE))[None]
    decoded, size, moved = stored.float(), 0, 0
    for encoded in PageEncoder(codec, which, PiKVConfig()).encode(stored, None, 1.0):
        decoded[:, torch.from_numpy(encoded.which)] = encoded.codec.decode(encoded.codes, torch.float32)
        size += sum(part.nbytes for part in encoded.codes.tensors())
        moved += len(encoded.which) * (encoded.codec.name != codec)
    read[pages] = decoded[0].flatten(0, 1)
    return _Read(read, size / (pages.stop - pages.start), moved / stored.shape[1])


def _per_token(tokens: torch.Tensor, levels: int) -> torch.Tensor:
    """Return tokens rounded to `levels` steps between their least and largest channel, ends left exact as in pages."""
    low, high = tokens.amin(dim=1, keepdim=True), tokens.amax(dim=1, keepdim=True)
    step = (high - low) / levels
    rounded = ((tokens - low) / step).round_() * step + low
    inside = slice(PAGE, PAGE + max(0, len(tokens) - PAGE - WINDOW) // PAGE * PAGE)
    return torch.cat([tokens[: inside.start], rounded[inside], tokens[inside.stop :]])


def _errors(
    layer: LatentInput, exact: torch.Tensor, latents: torch.Tensor, rotary: torch.Tensor
) -> tuple[float, float]:
    """Return the error over all heads, and that of the worst."""
    off = layer.output(latents, rotary) - exact
    return float(off.norm() / exact.norm()), float((off.norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max())


def measure(
    seeds: int = 3, tokens: int = 2048, heads: int = HEADS, cases: Sequence[str] = tuple(CASES)
) -> Iterator[Measured]:
    """Measure all pairs of codecs on every case."""
    for case in cases:
        layers = [latent_input(case, seed, tokens, heads) for seed in range(seeds)]
        exact = [layer.output(layer.latents, layer.rotary) for layer in layers]
        names = [list(dict.fromkeys(column)) for column in zip(*PAIRS, strict=True)]
        latents = {name: [_coded(layer.latents, name, KV.KEYS) for layer in layers] for name in names[0]}
        rotary = {name: [_coded(layer.rotary, name, KV.VALUES) for layer in layers] for name in names[1]}
        for of_latents, of_rotary in PAIRS:
            pairs = list(zip(latents[of_latents], rotary[of_rotary], strict=True))
            found = [
                _errors(layer, out, one.tokens, other.tokens)
                for layer, out, (one, other) in zip(layers, exact, pairs, strict=True)
            ]
            one, other = pairs[0]
            moved = (sum(pair[side].moved for pair in pairs) / seeds for side in (0, 1))
            yield Measured(case, of_latents, of_rotary, *_mean(found), one.bytes + other.bytes, *moved)
        for name, levels in PER_TOKEN.items():
            found = [
                _errors(layer, out, _per_token(layer.latents, levels), layer.rotary)
                for layer, out in zip(layers, exact, strict=True)
            ]
            yield Measured(case, f"{name}, a range per token", "none", *_mean(found))


def _mean(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    every, worst = zip(*found, strict=True)
    return root_mean_square(list(every)), root_mean_square(list(worst))


def show(console: Console, rows: Sequence[Measured], models: Sequence[ModelError]) -> None:
    """Print errors in percent by case, beside bytes, and errors of logits."""
    cases = list(dict.fromkeys(row.case for row in rows))
    lines = []
    for (latents, rotary), group in itertools.groupby(
        sorted(rows, key=lambda row: (row.latents, row.rotary)), lambda row: (row.latents, row.rotary)
    ):
        by_case = {row.case: row for row in group}
        size = by_case[cases[0]].bytes
        cells = [f"{percent(by_case[case].error)} / {percent(by_case[case].worst_head)}" for case in cases]
        lines.append([latents, rotary, "-" if size is None else f"{size:.0f}", *cells])
    columns = ["latents", "rotary", "bytes", *cases]
    show_table(console, "Error of attention in percent, of all heads / of the worst; bytes per token", columns, lines)
    few = [[row.model, row.latents, row.rotary, percent(row.error), percent(row.same_token)] for row in models]
    show_table(
        console,
        "Random models: error of logits, equal greedy tokens, in percent",
        ["model", *columns[:2], "logits", "equal"],
        few,
    )


def main(argv: list[str] | None = None) -> None:
    """Run the experiment, print its tables and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.codecs.latent_codecs", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for latent-codecs.json")
    parser.add_argument("--seeds", type=int, default=3, help="layers per case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(highlight=False)
    with torch.inference_mode(), console.status("measuring"):
        rows = list(measure(arguments.seeds))
        models = list(model_errors())
    show(console, rows, models)
    if arguments.output is not None:
        file = arguments.output / "latent-codecs.json"
        about = {"metric": METRIC, "geometry": {"heads": HEADS, "latent": LATENT, "rotary": ROTARY}}
        tables = {
            "results": [dataclasses.asdict(row) for row in rows],
            "models": [dataclasses.asdict(m) for m in models],
        }
        write_rows(file, {**about, "seeds": arguments.seeds}, tables)
        console.print(f"written to {file}", soft_wrap=True)


if __name__ == "__main__":
    main()
