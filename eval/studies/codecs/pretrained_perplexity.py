"""What each codec adds to a pretrained model's perplexity on prose and on code, from one reading of every beginning.

A window's beginning is read once, as the model made it; then each cache packs it and the rest goes through the cache in
chunks. Each window is kept with what each cache made of it as soon as that is measured: what was stopped goes on.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.runner.caches import cache_factory
from pikv_hf.eval.studies.kept_rows import keep, kept
from pikv_hf.eval.tasks.perplexity import Window, text_windows

from .attention_error import PAGE, WINDOW
from .codec_costs import Packed
from .read_once import read_once
from .real_text import Text

#: Tokens that are sent through a cache at once. Few, since a chunk's own tokens are exact, as those of the window are.
CHUNK = 64
METRIC = (
    "change: perplexity over that of the codec none, less one, over all scored tokens of all windows; the interval is"
    " 95%, normal, over blocks of 64 tokens; divergence: mean of KL(none || codec) of a token's distribution, in "
    "nats; nats: mean negative log likelihood of a scored token with the codec none. A window of `tokens` tokens is "
    "read but for its last `scored` ones in one call and packed, those then go through the cache 64 at a time; as "
    "always the first page, the last 128 tokens and what fills no page stay as they are in a PiKVCache. share: bytes "
    "of all that is kept for full pages over the bf16 bytes of their tokens; split: share of these tokens by codec"
)

Row = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Windows of one length of every text: how many, how many of their last tokens are scored, behind which codecs."""

    tokens: int
    windows: int
    scored: int
    codecs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A name for a file."""
        return f"perplexity-{self.tokens}-{self.windows}-{self.scored}"


#: Those that are compared at all lengths, and others; see :func:`cache_name`.
MAIN = ("int8", "int4", "int2", "auto", "lowrank", "quanto:4")
CODECS = (*MAIN, "fp8", "lowrank+int4", "int4/int2", "int2/int4", "auto@0.2", "quanto:2")
PARTS = (Part(2048, 8, 256, CODECS), Part(8192, 2, 256, MAIN))


def cache_name(codec: str) -> str:
    """Return the cache that a codec means.

    `int4`, `int8/int4` of keys and of values, `lowrank:32` of a rank, `auto@0.4` of an error budget, `quanto:4`.
    """
    if codec.startswith("quanto:"):
        return f"quantized:{codec}"
    names, _, rank = codec.partition(":")
    names, _, budget = names.partition("@")
    keys, _, values = names.partition("/")
    options = {"placement": "hash", "key_codec": keys, "value_codec": values or keys}
    options |= {"rank": rank} if rank else {}
    options |= {"error_budget": budget} if budget else {}
    return "pikv:" + ",".join(f"{name}={value}" for name, value in options.items())


def measure(model: Any, tokenizer: Any, part: Part, read: Text, file: Path) -> Iterator[Row]:
    """Yield what each codec makes of each window of a text; what the file has is not measured anew."""
    codecs = {codec: codec for codec in part.codecs}
    return measure_windows(model, tokenizer, part, read, file, codecs, lambda reader: reader.measure)


def measure_windows(
    model: Any,
    tokenizer: Any,
    part: Part,
    read: Text,
    file: Path,
    ways: Mapping[str, T],
    changing: Callable[["WindowReader"], Callable[[T], Row]],
) -> Iterator[Row]:
    """Yield what each way, by name, makes of each window of a text; what the file has is not measured anew.

    `changing` returns, for a window that was read, the function that measures a way.
    """
    known = kept(file)
    for window in text_windows(read.ids(tokenizer), part.tokens, part.windows, part.tokens - part.scored):
        about = {"text": read.name, "window": window.id}
        done = {row["codec"]: row for row in known if about.items() <= row.items()}
        if missing := [name for name in ways if name not in done]:
            measured = changing(WindowReader(model, window))
            for name in missing:
                done[name] = {**about, "codec": name, **measured(ways[name])}
                keep(file, [done[name]])
        yield from (done[name] for name in ways)


class WindowReader:
    """Sends the last tokens of a window through caches that hold its beginning, which is read once."""

    def __init__(self, model: Any, window: Window) -> None:
        self.model, self.window = model, window
        self.prompt = read_once(model, window.ids[:, : window.prefill])
        self.exact = [chunk.log_softmax(-1) for chunk in self._expected(self._filled("none"))]

    def measure(self, codec: str) -> Row:
        """Return what a codec makes of each chunk of 64 tokens, on average, and its bytes."""
        cache = self._filled(codec)
        row: Row = {}
        if isinstance(cache, PiKVCache) and codec != "none":
            packed = Packed.of(cache)
            row |= {"share": packed.share, "split": packed.split}
        return row | self.read(cache)

    @property
    def coded(self) -> slice:
        """The tokens of the beginning that codecs pack: whole pages between the first one and the window."""
        tokens = self.prompt.layers[0][1].shape[2]
        return slice(PAGE, PAGE + (tokens - PAGE - WINDOW) // PAGE * PAGE)

    def with_coded(self, tokens: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return keys or values `(1, H, T, D)` of a layer with the pages `(H, N, P, D)` changed that codecs pack."""
        changed = tokens.clone()
        pages = tokens[0, :, self.coded].unflatten(1, (-1, PAGE))
        changed[0, :, self.coded] = change(pages).flatten(1, 2)
        return changed

    def read_behind(self, layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Row:
        """Return the likelihoods of each chunk behind other queries, keys and values of all layers, stored exactly."""
        cache = cache_factory(cache_name("none")).make(self.model)
        return self.read(dataclasses.replace(self.prompt, layers=layers).fill(cache))

    def read(self, cache: Any) -> Row:
        """Return the likelihoods of each chunk through a cache that holds the beginning, and without any codec."""
        row: Row = {}
        targets = self.window.ids[0, self.window.prefill :].split(CHUNK)
        found = [chunk.log_softmax(-1) for chunk in self._expected(cache)]
        row["nats"] = [float(torch.nn.functional.nll_loss(*pair)) for pair in zip(found, targets, strict=True)]
        row["exact"] = [float(torch.nn.functional.nll_loss(*pair)) for pair in zip(self.exact, targets, strict=True)]
        row["divergence"] = [
            float((exact.exp() * (exact - other)).sum(-1).mean())
            for exact, other in zip(self.exact, found, strict=True)
        ]
        return row

    def _filled(self, codec: str) -> Any:
        return self.prompt.fill(cache_factory(cache_name(codec)).make(self.model))

    @torch.no_grad()
    def _expected(self, cache: Any) -> Iterator[torch.Tensor]:
        """Yield float32 logits `(64, V)` that predict each chunk's tokens."""
        last, window = self.prompt.logits, self.window
        for start in range(window.prefill, window.ids.shape[1], CHUNK):
            ids = window.ids[:, start : start + CHUNK]
            positions = torch.arange(start, start + ids.shape[1])[None]
            logits = self.model(ids, position_ids=positions, **cache_argument(cache)).logits
            yield torch.cat([last, logits[:, :-1]], dim=1)[0].float()
            last = logits[:, -1:]


def rows_of(part: Part, read: Text, found: Sequence[Row]) -> list[Row]:
    """Summarise the windows of a text: a row for each codec."""
    by_codec: dict[str, list[Row]] = {}
    for row in found:
        by_codec.setdefault(row["codec"], []).append(row)
    return [_summary(part, read, codec, rows) for codec, rows in by_codec.items()]


def _summary(part: Part, read: Text, codec: str, rows: Sequence[Row]) -> Row:
    blocks = [of - full for row in rows for of, full in zip(row["nats"], row["exact"], strict=True)]
    mean, half = statistics.fmean(blocks), 1.96 * statistics.stdev(blocks) / len(blocks) ** 0.5
    packed = [row for row in rows if "share" in row]
    names = sorted({name for row in packed for name in row["split"]})
    return {
        "text": read.name,
        "tokens": part.tokens,
        "codec": codec,
        "scored": CHUNK * len(blocks),
        "nats": statistics.fmean(nats for row in rows for nats in row["exact"]),
        "change": math.expm1(mean),
        "change_ci": [round(math.expm1(end), 6) for end in (mean - half, mean + half)],
        "divergence": statistics.fmean(nats for row in rows for nats in row["divergence"]),
        "share": statistics.fmean(row["share"] for row in packed) if packed else None,
        "split": {name: round(statistics.fmean(row["split"].get(name, 0.0) for row in packed), 4) for name in names}
        or None,
    }
