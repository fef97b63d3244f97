"""Low-rank bases that layers share, as in xKV (arXiv 2503.18893), against int4 and int2 at equal bytes.

Keys (or values) of all heads of neighbouring layers, side by side, become `r` coefficients per token that the layers
share, with a basis fitted to the prompt itself. Keys are taken without rotary embedding, as xKV does, or with it, as
pages have them. Coefficients have 16 bits or are int4 codes. Not a codec of PiKV: it is measured what one would gain.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.eval.runner.models import load_model
from pikv_hf.kernels.page_codes import Kind

from ...report.result_rows import show_table, write_rows
from .attention_error import PAGE
from .pretrained_perplexity import METRIC, Part, WindowReader, measure_windows, rows_of
from .quantisation_schemes import Shipped
from .real_text import Text, texts

PART = Part(4096, 1, 256)
#: Coded tokens at which bytes are counted: of a long text, in which bases weigh little.
LONG = 32768
#: Coded tokens that some bases are fitted to.
FEW = 2048
GROUPS = (1, 2, 4, 8)
#: Integer formats whose bytes are matched, and bits per code.
MATCHED: dict[Kind, int] = {"int4": 4, "int2": 2}
ABOUT = (
    "Only keys, or only values, of the coded tokens are changed. rank: the largest whose coefficients and bases take "
    "no more bytes than the matched format does at 32,768 tokens; on the shorter text that was read the bases, which "
    "are fitted to it, would take more: that is in favour of low rank. energy: share of the sum of squares that the "
    "rank keeps, of the tokens that bases are fitted to"
)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How keys or values are changed.

    Attributes
    ----------
    part : str
        `"keys"`, `"keys, rotated"` or `"values"`.
    matched : str
        The integer format whose bytes it may take.
    layers : int
        Layers that share coefficients; 0 is the integer format itself.
    coefficients : str
        `"none"` for 16 bits, or `"int4"`.
    first : int
        Coded tokens that the bases are fitted to, as a cache has to that cannot wait for all; 0 for all.
    """

    part: str
    matched: Kind
    layers: int = 0
    coefficients: Kind = "none"
    first: int = 0

    @property
    def name(self) -> str:
        """For files and tables."""
        if not self.layers:
            return f"{self.part}: {self.matched}"
        how = "16 bits" if self.coefficients == "none" else self.coefficients
        fitted = f", fitted to the first {self.first:,}" if self.first else ""
        return f"{self.part}: {self.layers} layers, {how}, bytes of {self.matched}{fitted}"

    def rank(self, heads: int, dim: int) -> int:
        """Return the rank for a layer's heads of `dim` channels each."""
        budget = _share(self.matched, dim, keys=self.part != "values")
        of_coefficient = _share(self.coefficients, dim, keys=False)
        channels = self.layers * heads * dim
        return min(channels, int(budget * LONG * channels / (of_coefficient * LONG + channels)))


def _share(kind: Kind, dim: int, *, keys: bool) -> float:
    """Return the bytes of a page in a format over those of 16 bits."""
    if kind == "none":
        return 1.0
    return Shipped(keys=keys).page_bytes(MATCHED[kind], PAGE, dim) / (PAGE * dim * 2)


def schemes() -> list[Scheme]:
    """Return what is compared."""
    found = [Scheme(part, kind) for part in ("keys", "values") for kind in MATCHED]
    for part, layers in itertools.product(("keys", "values"), GROUPS):
        found += [
            Scheme(part, "int4", layers),
            Scheme(part, "int4", layers, "int4"),
            Scheme(part, "int2", layers, "int4"),
        ]
    for layers, matched in itertools.product((GROUPS[0], GROUPS[-1]), MATCHED):
        found.append(Scheme("keys, rotated", matched, layers, "int4"))
    fewer = [("keys, rotated", 1), *itertools.product(("keys", "values"), (GROUPS[0], GROUPS[-1]))]
    return found + [Scheme(part, "int2", layers, "int4", FEW) for part, layers in fewer]


class Reconstruction:
    """What keys or values of a prompt become under a scheme."""

    def __init__(self, reader: WindowReader) -> None:
        self.reader = reader
        layers = reader.prompt.layers
        self.coded = reader.coded
        positions = torch.arange(layers[0][1].shape[2])[None]
        self.cos, self.sin = reader.model.model.rotary_emb(layers[0][1], positions)
        self._spaces: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._of = "", 0, 0

    def layers(self, scheme: Scheme) -> tuple[list[torch.Tensor], dict[str, float]]:
        """Return keys or values `(1, H, T, D)` of every layer, and the share of energy kept."""
        which = 2 if scheme.part == "values" else 1
        exact = [layer[which] for layer in self.reader.prompt.layers]
        if not scheme.layers:
            keys, bits = scheme.part != "values", MATCHED[scheme.matched]
            return [self.reader.with_coded(own, lambda pages: Shipped(keys=keys)(pages, bits)) for own in exact], {}
        changed: list[torch.Tensor] = []
        kept: list[float] = []
        for first in range(0, len(exact), scheme.layers):
            group = exact[first : first + scheme.layers]
            flat, vectors, energy = self._space(scheme, first, group)
            own = dataclasses.replace(scheme, layers=len(group))
            rank = own.rank(group[0].shape[1], group[0].shape[3])
            basis = vectors[:, -rank:]
            coefficients = flat @ basis
            if scheme.coefficients != "none":
                pages = coefficients.unflatten(0, (-1, PAGE))[None]
                coefficients = Shipped(keys=False)(pages, MATCHED[scheme.coefficients])[0].flatten(0, 1)
            kept.append(float(energy[-rank:].sum() / energy.sum()))
            parts = (coefficients @ basis.T).chunk(len(group), dim=1)
            for exactly, part in zip(group, parts, strict=True):
                heads = part.unflatten(1, (exactly.shape[1], -1)).transpose(0, 1)[None]
                changed.append(self._with(exactly, self._rotated(heads, 1) if scheme.part == "keys" else heads))
        return changed, {"energy": sum(kept) / len(kept)}

    def _space(
        self, scheme: Scheme, first: int, group: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the coded tokens of a group `(n, C)`, the directions `(C, C)` and energies `(C,)`, ascending."""
        if self._of != (of := (scheme.part, scheme.layers, scheme.first)):
            # One way to fit at a time: of all together the tokens would take gigabytes.
            self._spaces, self._of = {}, of
        if first not in self._spaces:
            tokens = [own[:, :, self.coded] for own in group]
            if scheme.part == "keys":
                tokens = [self._rotated(own, -1) for own in tokens]
            flat = torch.cat([own[0].transpose(0, 1).flatten(1) for own in tokens], dim=1)
            fitted = flat[: scheme.first or None]
            energy, vectors = torch.linalg.eigh((fitted.T @ fitted).double())
            self._spaces[first] = flat, vectors.float(), energy
        return self._spaces[first]

    def _rotated(self, keys: torch.Tensor, direction: int) -> torch.Tensor:
        """Turn coded keys to their positions, or back."""
        cos, sin = self.cos[:, None, self.coded], self.sin[:, None, self.coded] * direction
        left, right = keys.chunk(2, dim=-1)
        return keys * cos + torch.cat([-right, left], dim=-1) * sin

    def _with(self, exact: torch.Tensor, coded: torch.Tensor) -> torch.Tensor:
        changed = exact.clone()
        changed[:, :, self.coded] = coded
        return changed


def measure(model: Any, tokenizer: Any, part: Part, read: Text, file: Path) -> Iterator[Row]:
    """Yield what each scheme makes of each window of a text; what the file has is not measured anew."""
    ways = {scheme.name: scheme for scheme in schemes()}

    def changing(reader: WindowReader) -> Callable[[Scheme], Row]:
        return partial(measured, Reconstruction(reader))

    return measure_windows(model, tokenizer, part, read, file, ways, changing)


def measured(changes: Reconstruction, scheme: Scheme) -> Row:
    """Return the likelihoods of a window behind keys or values that a scheme has changed."""
    reader = changes.reader
    tokens, about = changes.layers(scheme)
    layers = [
        (query, keys, own) if scheme.part == "values" else (query, own, values)
        for (query, keys, values), own in zip(reader.prompt.layers, tokens, strict=True)
    ]
    return {**reader.read_behind(layers), **about}


def summary(part: Part, read: Text, found: Sequence[Row], heads: int, dim: int) -> list[Row]:
    """Return a row for each scheme, for layers of KV heads of `dim` channels."""
    ranks = {scheme.name: scheme.rank(heads, dim) for scheme in schemes() if scheme.layers}
    about = {row["codec"]: row for row in found}
    rows = []
    for row in rows_of(part, read, found):
        name = row.pop("codec")
        rows.append({"text": row.pop("text"), "tokens": row.pop("tokens"), "scheme": name, **row})
        if name in ranks:
            rows[-1] |= {"rank": ranks[name], "energy": about[name]["energy"]}
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.codecs.shared_bases", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a folder or a name, as of pikv eval")
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep what is measured in")
    parser.add_argument("--output", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False)
    model, tokenizer = load_model(arguments.model, "float32")
    rows: list[Row] = []
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for read in texts():
        found: list[Row] = []
        for row in measure(model, tokenizer, PART, read, arguments.parts / f"shared-{read.name}.jsonl"):
            found.append(row)
            console.print(f"{read.name}: {len(found)} of {PART.windows * len(schemes())}")
        rows += summary(PART, read, found, config.num_key_value_heads, head_dim)
    show_table(
        console,
        "Shared bases",
        ["text / scheme", "rank", "energy", "change (%)", "divergence"],
        [
            [
                f"{row['text']} / {row['scheme']}",
                str(row.get("rank", "-")),
                f"{row['energy']:.3f}" if "energy" in row else "-",
                f"{100 * row['change']:+.2f}",
                f"{row['divergence']:.4f}",
            ]
            for row in rows
        ],
    )
    if arguments.output is not None:
        write_rows(arguments.output, {"model": arguments.model, "metric": METRIC, "about": ABOUT}, {"results": rows})


if __name__ == "__main__":
    main()
