"""Low-rank bases of keys and values: per KV head or per expert shard; `eval/results/low-rank-bases.json`.

A head's tokens x become coefficients x A in a basis A of r columns, fitted by SVD without centring. PiKV's LoRA has a
basis per expert shard. Here such bases, of the bundled model's own routers, are compared with one basis per head, and
with bases of shards of the same sizes drawn at random: what these gain is due to more bases, not to the routers.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import Kind

from ...report.result_rows import percent, show_table, write_rows
from .attention_error import METRIC, PAGE, Subject, root_mean_square
from .quantisation_schemes import Shipped
from .sample_kv import EXPERTS, pretrained_inputs, reference_inputs

#: Shards of the bundled model: each of its experts is one.
SHARDS = EXPERTS

#: Tokens of the prompts, and how many of each task by default: with more tokens, bases of shards fit less by chance.
PROMPTS = {1024: 2, 4000: 1}

#: Ranks as shares of D, and lengths at which bytes are counted.
RANKS = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
LENGTHS = (1024, 32768)


@dataclasses.dataclass(frozen=True, slots=True)
class Fit:
    """What bases are fitted to.

    Attributes
    ----------
    shards : str
        `"one"` basis per head, or one per `"expert"` shard, or per `"random"` shard of the same sizes.
    first : int, optional
        Fit to so many coded tokens rather than to all, as a cache has to that cannot wait for them. A shard with fewer
        among them than the rank takes the basis of its head.
    """

    shards: str = "one"
    first: int | None = None

    @property
    def bases(self) -> int:
        """Bases per head."""
        return 1 if self.shards == "one" else SHARDS

    def labels(self, experts: torch.Tensor) -> torch.Tensor:
        """Return the shards `(n,)` of tokens, given their experts."""
        if self.shards == "random":
            return experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(0))]
        return experts if self.shards == "expert" else torch.zeros_like(experts)


FITS: dict[str, Fit] = {
    "per head": Fit(),
    "per expert shard": Fit("expert"),
    "per random shard": Fit("random"),
    "per head, first 256": Fit(first=256),
    "per expert shard, first 256": Fit("expert", first=256),
    "per head, first 1,024": Fit(first=1024),
    "per expert shard, first 1,024": Fit("expert", first=1024),
}
#: Those that are also measured with a quantised residual.
WITH_RESIDUAL = ("per head", "per expert shard")


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One row of the results.

    Attributes
    ----------
    tokens : int
        Length of the prompts.
    part : str
        `"keys"`, `"values"` or `"both"`.
    fit : str
        One of :data:`FITS`.
    rank, dim : int
        Columns of a basis, and D.
    residual : str
        Kind of the codes of what the basis leaves, `"-"` without any.
    error : float
        As in :data:`~pikv_hf.eval.studies.codecs.attention_error.METRIC`.
    share_1024, share_32768 : float
        Bytes of as many coded tokens over those of bf16: coefficients and bases of 16 bits, and codes.
    """

    tokens: int
    part: str
    fit: str
    rank: int
    dim: int
    residual: str
    error: float
    share_1024: float
    share_32768: float


def fit_basis(tokens: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the `rank` first right singular vectors of `(H, n, D)`, as bf16 holds them: `(H, D, rank)` float32."""
    _, vectors = torch.linalg.eigh(tokens.transpose(1, 2) @ tokens)
    return vectors[..., -rank:].bfloat16().float()


def project(tokens: torch.Tensor, experts: torch.Tensor, fit: Fit, rank: int) -> torch.Tensor:
    """Return the low-rank part of tokens, coefficients rounded to bf16.

    Parameters
    ----------
    tokens : torch.Tensor
        `(H, n, D)` float32.
    experts : torch.Tensor
        `(n,)` int64, the primary experts.
    fit : Fit
        Which bases.
    rank : int
        Columns of each basis.
    """
    fitted = fit.first or tokens.shape[1]
    labels = fit.labels(experts)
    of_head = fit_basis(tokens[:, :fitted], rank)
    result = torch.empty_like(tokens)
    for shard in labels.unique():
        own = (labels[:fitted] == shard).nonzero().squeeze(1)
        few = fit.first is not None and len(own) < rank
        basis = of_head if few else fit_basis(tokens[:, own], rank)
        inside = labels == shard
        result[:, inside] = (tokens[:, inside] @ basis).bfloat16().float() @ basis.transpose(1, 2)
    return result


def decode(pages: torch.Tensor, experts: torch.Tensor, fit: Fit, rank: int, kind: Kind, *, keys: bool) -> torch.Tensor:
    """Return pages `(H, N, P, D)` as read back from coefficients and, unless `kind` is `"none"`, a coded residual."""
    low = project(pages.flatten(1, 2), experts, fit, rank).view_as(pages)
    return low if kind == "none" else low + decode_pages(encode_pages(pages - low, kind, keys=keys), torch.float32)


def measure_fit(
    subjects: Sequence[Subject], tokens: int, name: str, rank: int, kind: Kind = "none"
) -> Iterator[Measured]:
    """Measure keys, values and both, projected alike, of prompts of `tokens` tokens."""
    errors: dict[str, list[float]] = {"keys": [], "values": [], "both": []}
    for subject in subjects:
        experts = subject.layer.experts[subject.coded]
        keys = decode(subject.key_pages, experts, FITS[name], rank, kind, keys=True)
        values = decode(subject.value_pages, experts, FITS[name], rank, kind, keys=False)
        errors["keys"].append(subject.error(keys=keys))
        errors["values"].append(subject.error(values=values))
        errors["both"].append(subject.error(keys, values))
    dim = subjects[0].layer.keys.shape[-1]
    for part, found in errors.items():
        shares = [byte_share(part, FITS[name], rank, dim, kind, length) for length in LENGTHS]
        residual = "-" if kind == "none" else kind
        yield Measured(tokens, part, name, rank, dim, residual, root_mean_square(found), *shares)


def byte_share(part: str, fit: Fit, rank: int, dim: int, kind: Kind, tokens: int) -> float:
    """Return the bytes of `tokens` coded tokens over those of bf16; of both keys and values, the mean."""
    share = rank / dim + fit.bases * rank / tokens
    if kind == "none":
        return share
    bits = int(kind.removeprefix("int"))
    chosen = {"keys": (True,), "values": (False,), "both": (True, False)}[part]
    residual = [Shipped(keys=keys).page_bytes(bits, PAGE, dim) / (PAGE * dim * 2) for keys in chosen]
    return share + sum(residual) / len(residual)


def rank_of_equal_bytes(rank: int, dim: int, tokens: int) -> int:
    """Return the largest rank of one basis per head that takes no more bytes than SHARDS bases of `rank`."""
    per_rank, of_shards = 1 / dim + 1 / tokens, 1 / dim + SHARDS / tokens
    return min(dim, int(rank * of_shards / per_rank + 1e-9))


def measure(tokens: int = 1024, samples: int = 1, ranks: Sequence[float] = RANKS) -> Iterator[Measured]:
    """Run the experiment on `samples` prompts of `tokens` tokens per task, with ranks as shares of D."""
    subjects = [Subject.of(layer) for layer in reference_inputs(tokens, samples)]
    yield from measure_fits(subjects, tokens, ranks, tuple(FITS), WITH_RESIDUAL)


def measure_pretrained(name: str, tokens: int = 2048, windows: int = 1) -> Iterator[Measured]:
    """Run it on all layers of a pretrained dense model, on windows of prose and of code; without experts, no shards."""
    layers = pretrained_inputs(name, tokens, windows)
    subjects = [Subject.of(layer) for own in layers.values() for layer in own]
    fits = [fit for fit in FITS if FITS[fit].shards == "one"]
    yield from measure_fits(subjects, tokens, RANKS, fits, ("per head",))


def measure_fits(
    subjects: Sequence[Subject], tokens: int, ranks: Sequence[float], fits: Sequence[str], with_residual: Sequence[str]
) -> Iterator[Measured]:
    """Measure ways to fit bases, some also with a quantised residual, with ranks as shares of D."""
    dim = subjects[0].layer.keys.shape[-1]
    coded = min(len(subject.coded) for subject in subjects)
    kinds: tuple[Kind, ...] = ("int4", "int2")
    for rank in (round(share * dim) for share in ranks):
        for name in fits:
            if (FITS[name].first or 0) < coded:
                yield from measure_fit(subjects, tokens, name, rank)
        shards = any(FITS[name].bases > 1 for name in fits)
        if shards and (equal := rank_of_equal_bytes(rank, dim, tokens)) != rank:
            yield from measure_fit(subjects, tokens, "per head", equal)
        for name, kind in itertools.product(with_residual, kinds):
            yield from measure_fit(subjects, tokens, name, rank, kind)


def show(console: Console, rows: Sequence[Measured]) -> None:
    """Print errors in percent beside the share of bytes, a table per length of prompts."""
    columns = ["bases", "rank", "residual", "share at 1,024", "at 32,768", "keys", "values", "both"]
    for tokens, of_length in itertools.groupby(rows, lambda row: row.tokens):
        lines = []
        for _, group in itertools.groupby(of_length, lambda row: (row.fit, row.rank, row.residual)):
            keys, values, both = group
            shares = [f"{both.share_1024:.3f}", f"{both.share_32768:.3f}"]
            errors = [percent(row.error) for row in (keys, values, both)]
            lines.append([both.fit, f"{both.rank} of {both.dim}", both.residual, *shares, *errors])
        title = f"Prompts of {tokens:,} tokens: error of attention in percent; bytes as a share of bf16"
        show_table(console, title, columns, lines)


def main(argv: list[str] | None = None) -> None:
    """Run the experiment, print its table and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.codecs.low_rank_bases", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for low-rank-bases.json")
    parser.add_argument("--samples", type=int, help="prompts of each length per task (default: 2 short, 1 long)")
    parser.add_argument("--model", help="a pretrained dense model instead: low-rank-bases-MODEL.json")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console(highlight=False)
    stem = "low-rank-bases"
    about: dict[str, Any] = {"metric": METRIC, "data": "bundled model, 4 layers"}
    with torch.inference_mode(), console.status("measuring"):
        if arguments.model is None:
            about["samples_per_task"] = arguments.samples or PROMPTS
            rows = [row for tokens, few in PROMPTS.items() for row in measure(tokens, arguments.samples or few)]
        else:
            rows = list(measure_pretrained(arguments.model))
            name = Path(arguments.model).name
            stem, about["data"] = f"{stem}-{name}", f"{name}, all layers, a window of prose and one of code"
    show(console, rows)
    if arguments.output is not None:
        file = arguments.output / f"{stem}.json"
        write_rows(file, about, {"results": [dataclasses.asdict(row) for row in rows]})
        console.print(f"written to {file}", soft_wrap=True)


if __name__ == "__main__":
    main()
