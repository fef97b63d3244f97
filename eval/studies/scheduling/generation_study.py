"""What a budget costs a text that is generated: the loss of thousands of tokens that come one by one.

A pretrained model reads a short beginning in one call and the rest token by token, as given, under budgets that hold at
every step: those of caches, presses of this project that go on while tokens come, and kvpress's `DecodingPress` around
its own. Every way is kept in a folder as soon as it is measured; what was stopped goes on there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.bench.press_prefill import dense_bytes
from pikv_hf.eval.report.result_rows import show_table, write_rows
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.studies.codecs.real_text import Text, texts
from pikv_hf.eval.studies.scheduling.budget_study import interval
from pikv_hf.eval.studies.scheduling.decoding_ways import OPTIONS, WAYS, Way

Row = dict[str, Any]

PROMPT, GENERATED = 256, 4096
#: Tokens between decisions, and those over which losses are averaged first.
EVERY = 64
#: Steps of which times are compared, at the beginning of what exceeds the budget and at the end.
TIMED = 512
METRIC = (
    f"nats: mean negative log likelihood of the tokens after the first {PROMPT}, read one by one; minus_full: its "
    f"difference from the full cache, interval 95%, normal, over blocks of {EVERY} tokens of all windows; held: the "
    "most bytes of keys and values of all layers after any step that was looked at, as a share of those of all tokens "
    f"at the end; slower: median seconds of the last {TIMED} steps over those of the {TIMED} after the budget is used "
    "up. A budget of tokens is one of the bytes of so many for 'budget' and PiKVPress"
)


@torch.no_grad()
def measured(model: Any, ids: torch.Tensor, way: Way, budget: int) -> Row:
    """Return mean losses by block and window, bytes, and seconds by step, of windows `(B, PROMPT + N)`."""
    cache = way.cache(model, budget)
    blocks: list[list[float]] = []
    losses: list[torch.Tensor] = []
    seconds, most = [], 0
    with way.press(budget, EVERY)(model):
        logits = _step(model, cache, ids[:, :PROMPT], 0)
        for at in range(PROMPT, ids.shape[1]):
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, at], reduction="none")
            losses.append(loss)
            if len(losses) == EVERY:
                blocks.append(torch.stack(losses).mean(0).tolist())
                losses = []
            started = time.perf_counter()
            logits = _step(model, cache, ids[:, at : at + 1], at)
            seconds.append(time.perf_counter() - started)
            # A decision comes when a multiple has been seen: the most is held just before it.
            if (at + 1) % (EVERY // 4) in (0, EVERY // 4 - 1):
                most = max(most, cache.nbytes if isinstance(cache, PiKVCache) else dense_bytes(cache))
    return {"blocks": blocks, "nbytes": most, "seconds": [round(spent, 5) for spent in seconds]}


def _step(model: Any, cache: Any, ids: torch.Tensor, past: int) -> torch.Tensor:
    """Return the logits after tokens at their positions, whatever a press has left of those before."""
    positions = torch.arange(past, past + ids.shape[1])[None].expand(len(ids), -1)
    return model(ids, position_ids=positions, logits_to_keep=1, **cache_argument(cache)).logits[:, -1]


def windows_of(read: Text, tokenizer: Any, generated: int, count: int) -> torch.Tensor:
    """Return windows of a text, `(count, PROMPT + generated)`, as far apart as it allows."""
    ids, length = read.ids(tokenizer), PROMPT + generated
    if len(ids) < length:
        raise ValueError(f"{read.name} has {len(ids):,} tokens, and a window {length:,}")
    starts = torch.linspace(0, len(ids) - length, count).long() if count > 1 else torch.zeros(1, dtype=torch.long)
    return torch.stack([ids[start : start + length] for start in starts])


def rows_of(parts: dict[str, Row], names: Sequence[str], budget: int, token_bytes: int) -> list[Row]:
    """Return a row for each way and text; `names` are those of the texts, whose windows follow one another."""
    rows = []
    for way, part in parts.items():
        blocks = torch.tensor(part["blocks"], dtype=torch.float64)
        windows, timed = blocks.shape[1], part["seconds"]
        held = part["nbytes"] / (windows * (PROMPT + EVERY * len(blocks)) * token_bytes)
        begin = budget - PROMPT + EVERY
        lasts = len(timed) >= begin + 2 * TIMED
        slower = statistics.median(timed[-TIMED:]) / statistics.median(timed[begin:][:TIMED]) if lasts else None
        for name, own in zip(names, blocks.chunk(len(names), dim=1), strict=True):
            row: Row = {"way": way, "text": name, "windows": own.shape[1], "tokens": own.numel() * EVERY}
            row |= {"budget": budget, "nats": float(own.mean()), "held": held, "slower": slower}
            if way != "full" and "full" in parts:
                exact = torch.tensor(parts["full"]["blocks"], dtype=torch.float64).chunk(len(names), dim=1)
                apart = (own - exact[names.index(name)]).flatten().tolist()
                row |= {"minus_full": statistics.fmean(apart), "minus_full_ci": interval(apart)}
            rows.append(row)
    return rows


def _show(console: Console, rows: Sequence[Row]) -> None:
    cells = [
        [
            f"{row['way']}, {row['text']}",
            f"{row['tokens']:,}",
            f"{100 * row['held']:.1f}",
            f"{row['nats']:.3f}",
            f"{row['minus_full']:+.3f} ± {row['minus_full_ci']:.3f}" if "minus_full" in row else "",
            "" if row["slower"] is None else f"{row['slower']:.2f}",
        ]
        for row in rows
    ]
    columns = ["", "tokens", "most held (%)", "nats", "- full", "last / first steps"]
    show_table(console, "Loss of tokens that come one by one", columns, cells)


def main(argv: list[str] | None = None) -> None:
    """Run the study, print its table and write its rows."""
    name = "python -m pikv_hf.eval.studies.scheduling.generation_study"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    parser.add_argument("--model", default="smollm2", help="as of pikv eval")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--generated", type=int, default=GENERATED, help="tokens that come one by one")
    parser.add_argument("--share", type=float, default=0.25, help="of all tokens, which is the budget")
    parser.add_argument("--windows", type=int, default=2, help="windows of each text, read side by side")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--parts", type=Path, required=True, help="folder to keep parts in; those there are taken")
    parser.add_argument("--output", type=Path, help="file for the results")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, (model, tokenizer) = Console(highlight=False), load_model(arguments.model, arguments.dtype)
    budget = int(arguments.share * (PROMPT + arguments.generated))
    arguments.parts.mkdir(parents=True, exist_ok=True)
    read = texts()
    ids = torch.cat([windows_of(each, tokenizer, arguments.generated, arguments.windows) for each in read])
    parts: dict[str, Row] = {}
    for way in arguments.ways:
        setting = f"{Path(arguments.model).name}-{arguments.dtype}-{arguments.generated}-{budget}-{arguments.windows}"
        file = arguments.parts / f"{way}-{setting}.json"
        if not file.exists():
            file.write_text(json.dumps(measured(model, ids, WAYS[way], budget)))
            console.print(f"{way}: measured")
        parts[way] = json.loads(file.read_text())
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * dim
    rows = rows_of(parts, [each.name for each in read], budget, numbers * model.dtype.itemsize)
    if arguments.output is not None:
        sources = {each.name: {"source": each.source, "sha256": each.digest} for each in read}
        about = {"metric": METRIC, "model": arguments.model, "dtype": arguments.dtype, "options": OPTIONS}
        write_rows(arguments.output, {**about, "prompt": PROMPT, "texts": sources}, {"generation": rows})
    _show(console, rows)


if __name__ == "__main__":
    main()
