"""What each codec costs, through the cache itself: bytes and errors; `eval/results/codec-costs.json`.

Bytes are counted at the geometry of a large model and on the bundled one; the error is that of attention that reads
the packed pages, on the bundled model and on random models of larger geometry.
"""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf import PiKVCache
from pikv_hf.common.tensors import live_bytes
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.decode import HEAD_DIM, filled_pikv, geometry_model
from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.tasks import reference
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer_codecs import remember_queries
from pikv_hf.reports.memory_report import CodecMemory

from ...report.result_rows import percent, show_table, write_rows
from .attention_error import Subject, root_mean_square
from .sample_kv import GEOMETRIES, QUERIES, random_inputs, reference_inputs

REFERENCE = "reference"
HEADS = (4, 8)

#: What the results say about how they were measured.
ABOUT = {
    "bytes": "bytes of all that the cache keeps for full pages (codes, scales, bases, positions, experts, page tables, "
    "reference counts, observed queries, unused pages) over the bf16 bytes of the tokens in them; pages that no codec "
    "took count as they are stored; of the codec none, the whole cache over all its tokens",
    "bytes_4_heads, bytes_8_heads": f"8,192 random bf16 tokens, head dim {HEAD_DIM}, pages of 32, 4 and 8 KV heads",
    "bytes_reference": "bundled model, 7 RULER tasks of 1,024 tokens, all layers; the model runs in float32, so that "
    "what is not coded, low-rank coefficients and bases among it, has twice the bytes of bf16",
    "split": "share of the tokens in full pages by codec of keys/values, of these prompts",
    "error": "||attention output - exact attention output|| / ||exact attention output|| (Frobenius, over the query "
    "heads of the last 48 queries of a layer and prompt), root mean square over layers and prompts; attention reads "
    "the cache, which was filled with the float32 tokens before these 48, in shards of their experts: first page, "
    "newest 128 tokens and open pages are exact, as the 48 tokens themselves",
    "key_error, value_error, logit_error": "of the packed pages, as in cache.memory_report(): relative root mean "
    "square error of keys and values; root mean square error of the logits of the queries before the 48",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """A codec of keys and values alike.

    Attributes
    ----------
    codec : str
        One of `CODECS`.
    part : int, optional
        Of the low-rank codecs: the rank is the head dim divided by it.
    """

    codec: str
    part: int | None = None

    @property
    def rank(self) -> str | None:
        """The rank in words, `"D/4"`."""
        return None if self.part is None else f"D/{self.part}"

    def rank_at(self, dim: int) -> int | None:
        """Return the rank at a head dim."""
        return None if self.part is None else dim // self.part

    def options(self, dim: int) -> dict[str, Any]:
        """Return the options of a cache."""
        return {"key_codec": self.codec, "value_codec": self.codec, "rank": self.rank_at(dim)}


#: The rows of the table: every codec, the low-rank ones at their default rank, and twice that rank.
CHOICES = (
    Choice("none"),
    Choice("int8"),
    Choice("int4"),
    Choice("int2"),
    Choice("fp8"),
    Choice("auto"),
    Choice("lowrank", 4),
    Choice("lowrank", 2),
    Choice("lowrank+int4", 4),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Packed:
    """The full pages of caches.

    Attributes
    ----------
    size : int
        Bytes of all that is kept for them.
    plain_size : int
        Bytes of their tokens in bf16.
    tokens : Counter
        By codec.
    """

    size: int
    plain_size: int
    tokens: Counter[str]

    @classmethod
    def of(cls, cache: PiKVCache) -> "Packed":
        """Count the full pages of a cache; of one without codecs, everything."""
        size, plain_size, tokens = cache.nbytes, 0, Counter[str]()
        for table in (layer.table for layer in cache.layers):
            pool = table.plain
            per_token = pool.keys.shape[0] * (pool.keys.shape[-1] + pool.values.shape[-1]) * 2
            held = pool.incompressible & (pool.allocator.refcount > 0)
            here = Counter({of.name: int(packed.count.sum()) for of, packed in table.pools.packed.items()})
            if table.pools.encoders.packs:
                size -= live_bytes(pool.tensors()) + pool.host_bytes - int(held.sum()) * pool.page_bytes
                here["none"] += int(pool.count[held].sum())
            else:
                here["none"] += sum(table.tokens())
            tokens += here
            plain_size += per_token * here.total()
        return cls(size, plain_size, tokens)

    def __add__(self, other: "Packed") -> "Packed":
        return Packed(self.size + other.size, self.plain_size + other.plain_size, self.tokens + other.tokens)

    @property
    def share(self) -> float:
        """Bytes over those of bf16."""
        return self.size / self.plain_size

    @property
    def split(self) -> dict[str, float]:
        """Share of tokens by codec."""
        return {name: round(count / self.tokens.total(), 4) for name, count in sorted(self.tokens.items())}


def random_bytes(choice: Choice, heads: int, tokens: int = 8192) -> float:
    """Return the bytes, over those of bf16, of random bf16 tokens of `heads` KV heads."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, heads, tokens, HEAD_DIM).bfloat16()
    cache = filled_pikv(geometry_model(), keys, values, **choice.options(HEAD_DIM))
    cache.layers[0].settle()
    return Packed.of(cache).share


def reference_bytes(choice: Choice, length: int = 1024, samples: int = 1) -> tuple[Packed, int]:
    """Return what the bundled model's cache packs of the prompts of all tasks, and the model's head dim."""
    model, tokenizer = load_reference_model()
    dim = model.config.head_dim
    found = Packed(0, 0, Counter())
    for sample in reference.generate(length, samples):
        cache = PiKVCache.for_model(model, **choice.options(dim))
        ids = tokenizer(sample.context + sample.question + sample.answer_prefix, return_tensors="pt").input_ids
        model(ids, **cache_argument(cache), logits_to_keep=1)
        for layer in cache.layers:
            layer.settle()
        found += Packed.of(cache)
    return found, dim


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """The errors of a codec on a model.

    Attributes
    ----------
    codec, rank : str, str or None
        Of the :class:`Choice`.
    model : str
        `"reference"`, one of the geometries, or `"random"` for all of these.
    error : float
        As in :data:`ABOUT`.
    key_error, value_error, logit_error : float or None
        Of the packed pages; None without any.
    coded : float
        Share of the tokens before the last 48 that are in packed pages.
    """

    codec: str
    rank: str | None
    model: str
    error: float
    key_error: float | None
    value_error: float | None
    logit_error: float | None
    coded: float


class Reader:
    """Attends to a layer's tokens through a cache.

    The bundled model lends the cache its router, of as many experts as all models here have.
    """

    def __init__(self) -> None:
        self._model, _ = load_reference_model()

    def read(self, subject: Subject, choice: Choice) -> tuple[float, CodecMemory]:
        """Return the relative error of the attention output, and what the codec packed."""
        layer = subject.layer
        tokens, dim = layer.keys.shape[1:]
        cache = PiKVCache.for_model(self._model, **choice.options(dim))
        held = cache.layers[0]
        past = slice(0, tokens - QUERIES)
        held.update_from_attention(layer.keys[None, :, past], layer.values[None, :, past])
        held.attend_begins(None)
        remember_queries(held.store, layer.observed[None], dim**-0.5)
        held.record_experts(layer.experts[past])
        held.settle()
        packed = CodecMemory(choice.codec, 0, 0, 0, 0)
        for name, memory in cache.memory_report().per_codec.items():
            packed = packed if name == "none" else packed + memory
        new = slice(tokens - QUERIES, tokens)
        held.update_from_attention(layer.keys[None, :, new], layer.values[None, :, new])
        held.attend_begins(None)
        out, _ = attend(held, layer.query[None])
        exact = subject.output.view_as(out[0])
        return ((out[0] - exact).norm() / exact.norm()).item(), packed


def measure_errors(model: str, subjects: Sequence[Subject], choice: Choice, reader: Reader) -> Measured:
    """Return the errors of a codec over all subjects."""
    read = [reader.read(subject, choice) for subject in subjects]
    packed = sum((memory for _, memory in read), CodecMemory(choice.codec, 0, 0, 0, 0))
    before = sum(subject.layer.keys.shape[1] - QUERIES for subject in subjects)
    return Measured(
        choice.codec,
        choice.rank,
        model,
        root_mean_square([error for error, _ in read]),
        packed.key_error if packed.tokens else None,
        packed.value_error if packed.tokens else None,
        packed.logit_error,
        packed.tokens / before,
    )


def measure(samples: int = 2, tokens: int = 1024) -> Iterator[tuple[dict[str, Any], list[Measured]]]:
    """Run the experiment.

    Parameters
    ----------
    samples : int
        Prompts of the bundled model per task, of the errors.
    tokens : int
        Length of all prompts but those whose bytes are counted at head dim 128.

    Yields
    ------
    tuple
        The row of a codec, and its errors by model.
    """
    inputs = {REFERENCE: [Subject.of(layer) for layer in reference_inputs(tokens, samples)]}
    for name in GEOMETRIES:
        inputs[name] = [Subject.of(layer) for layer in random_inputs(name, tokens)]
    everything = [subject for name in GEOMETRIES for subject in inputs[name]]
    reader = Reader()
    for choice in CHOICES:
        packed, dim = reference_bytes(choice, tokens)
        rows = [measure_errors(name, subjects, choice, reader) for name, subjects in inputs.items()]
        rows.append(measure_errors("random", everything, choice, reader))
        of_reference, of_random = rows[0], rows[-1]
        row: dict[str, Any] = {"codec": choice.codec, "rank": choice.rank, "reference_rank": choice.rank_at(dim)}
        row |= {f"bytes_{heads}_heads": random_bytes(choice, heads) for heads in HEADS}
        row |= {"bytes_reference": packed.share, "split": packed.split}
        row |= {"error_reference": of_reference.error, "error_random": of_random.error}
        yield row, rows


def show(console: Console, codecs: Sequence[dict[str, Any]], errors: Sequence[Measured]) -> None:
    """Print bytes and errors in percent, a line per codec."""
    lines = []
    for row in codecs:
        own = {m.model: m for m in errors if (m.codec, m.rank) == (row["codec"], row["rank"])}
        pair = [own[REFERENCE], own["random"]]
        shares = [" / ".join(percent(row[f"bytes_{heads}_heads"]) for heads in HEADS), percent(row["bytes_reference"])]
        columns = [[getattr(m, name) for m in pair] for name in ("error", "key_error", "value_error", "coded")]
        logits = " / ".join("-" if m.logit_error is None else f"{m.logit_error:.3f}" for m in pair)
        cells = [" / ".join(map(error_percent, column)) for column in columns]
        lines.append([codec_label(row), *shares, *cells[:3], logits, cells[3]])
    names = ["bytes, 4 / 8 heads", REFERENCE, "attention error", "K error", "V error", "logit error", "tokens packed"]
    title = "Codecs in percent: bytes of bf16's; errors on the bundled model / on four random models of larger geometry"
    show_table(console, title, ["codec", *names], lines)
    for row in codecs:
        if len(row["split"]) > 1:
            split = ", ".join(f"{name} {percent(share)}%" for name, share in row["split"].items())
            console.print(f"{codec_label(row)}, tokens of the bundled model by codec of keys/values: {split}")


def error_percent(error: float | None) -> str:
    """Return an error in percent: a dash for None, 0 where only rounding of float32 is left."""
    return "-" if error is None else percent(error) if error >= 1e-5 else "0"


def codec_label(row: dict[str, Any]) -> str:
    """Return the name of a row: `"lowrank, rank D/4"`."""
    return row["codec"] + (f", rank {row['rank']}" if row.get("rank") else "")


def main(argv: list[str] | None = None) -> None:
    """Run the experiment, print its table and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.codecs.codec_costs", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for codec-costs.json")
    parser.add_argument("--samples", type=int, default=2, help="prompts of the bundled model per task, for errors")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(highlight=False)
    codecs: list[dict[str, Any]] = []
    errors: list[Measured] = []
    with torch.inference_mode(), console.status("measuring"):
        for row, measured in measure(arguments.samples):
            codecs.append(row)
            errors += measured
    show(console, codecs, errors)
    if arguments.output is not None:
        file = arguments.output / "codec-costs.json"
        about = {"definitions": ABOUT, "samples_per_task": arguments.samples}
        write_rows(file, about, {"codecs": codecs, "errors": [dataclasses.asdict(row) for row in errors]})
        console.print(f"written to {file}", soft_wrap=True)


if __name__ == "__main__":
    main()
