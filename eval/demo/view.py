"""How the demo's result is shown: tables of at most 100 columns that read without colour, or JSON."""

import contextlib
import json
from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pikv_hf.eval.demo.demo import DemoResult, LayerSpread
from pikv_hf.eval.demo.measure import Answer
from pikv_hf.reports.cache_stats import tier_tables
from pikv_hf.reports.memory_report import format_bytes

WIDTH = 100
_BAR_WIDTH = 40
# A line with one character per value groups neighbours beyond this many.
_MAX_COLUMNS = 24
_LEVELS = "▁▂▃▄▅▆▇█"


def working(quiet: bool) -> contextlib.AbstractContextManager[object]:
    """Show on the error stream that the demo is running, unless `quiet` or not on a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return contextlib.nullcontext()
    return console.status("Answering with both caches")


def print_json(result: DemoResult) -> None:
    """Print the result as one JSON object."""
    print(json.dumps(result.to_dict()))


def print_result(result: DemoResult, console: Console | None = None) -> None:
    """Print the result as tables."""
    if console is None:
        console = Console(highlight=False)
        console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    plain = console.options.ascii_only
    parts: list[RenderableType] = [_heading(result), _answers(result, plain), _verdict(result), _costs(result)]
    if len(result.per_device) > 1:
        parts.append(_devices(result))
    if result.spread:
        parts += [_shards(result, plain), _layers(result.spread, plain)]
    if result.stats.tiers is not None:
        parts += tier_tables(result.stats.tiers)
    for part in parts:
        console.print(part)
        console.print()


def _heading(result: DemoResult) -> Text:
    return Text.assemble(
        ("One text, several questions, two caches\n", "bold"),
        f"{result.model} ({result.model_type}), {result.dtype} on {result.device}. It reads {result.context_tokens:,} "
        "tokens once; then each question continues from its own copy of the cache.",
    )


def _table(title: str, *columns: str) -> Table:
    """Return an empty table whose first column is text and whose other columns are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


# Answers


def _answers(result: DemoResult, plain: bool) -> Table:
    known = any(answer is not None for answer in result.expected)
    table = _table("Answers", "")
    table.expand = True
    table.add_column("question", ratio=4)
    if known:
        table.add_column("expected", ratio=3)
    for cache in (result.dynamic, result.pikv):
        table.add_column(cache.cache, ratio=3)
    rows = zip(result.questions, result.expected, result.dynamic.answers, result.pikv.answers, strict=True)
    for number, (question, expected, theirs, ours) in enumerate(rows, start=1):
        cells = [_one_line(question), *([_one_line(expected or "")] if known else [])]
        table.add_row(str(number), *cells, _marked(theirs, plain), _marked(ours, plain))
    return table


def _one_line(text: str) -> Text:
    """Return text from a model or file as it may go to a terminal: one line, no control characters, no markup."""
    line = " ".join(text.split())
    return Text("".join(character if character.isprintable() else "?" for character in line))


def _marked(answer: Answer, plain: bool) -> Text:
    """Return an answer behind a mark of its own shape for right and wrong; unmarked if that is not known."""
    if answer.right is None:
        return _one_line(answer.text)
    right, wrong = ("ok", "XX") if plain else ("✓", "✗")
    return Text.assemble((f"{right if answer.right else wrong} ", "bold"), _one_line(answer.text))


def _verdict(result: DemoResult) -> Text:
    same = "The caches gave the same tokens for every question."
    verdict = Text(same if result.agree else f"NOT THE SAME: {result.describe_disagreement()}.", style="bold")
    verdict.append(f" Largest difference of a logit: {result.logit_difference:.1e}.", style="not bold")
    judged = [answer.right for answer in result.pikv.answers if answer.right is not None]
    if judged:
        verdict.append(f"\nWith PiKVCache {sum(judged)} of {len(judged)} answers are right.", style="not bold")
    return verdict


# Costs


def _seconds(amount: float) -> str:
    return f"{amount:.2f} s" if amount >= 1 else f"{amount * 1e3:.2f} ms"


_COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("memory of the text", "context_bytes", format_bytes),
    ("memory with all questions open", "open_bytes", format_bytes),
    ("time to read the text", "prefill_seconds", _seconds),
    ("time to copy the cache, median", "copy_seconds", _seconds),
    ("time per further token, median", "token_seconds", _seconds),
)


def _costs(result: DemoResult) -> Group:
    table = _table("Costs", "", result.dynamic.cache, result.pikv.cache, "PiKV / Dynamic")
    for label, attribute, form in _COSTS:
        amounts = [getattr(cache, attribute) for cache in (result.dynamic, result.pikv)]
        if None not in amounts:
            table.add_row(label, *map(form, amounts), f"{amounts[1] / amounts[0]:.3f}")
    note = "Memory is counted from live storages; what copies share counts once. Times are of this run."
    return Group(table, note)


def _devices(result: DemoResult) -> Group:
    """Return the bytes of PiKV's cache on each device."""
    table, total = _table("Memory by device", "", "memory", "share"), sum(result.per_device.values())
    for device, held in result.per_device.items():
        table.add_row(device, format_bytes(held), f"{held / total:.1%}")
    return Group(table, "Of PiKVCache, with all questions open. Each device has its shards and a copy of the window.")


# Where the tokens are


def _shards(result: DemoResult, plain: bool) -> Group:
    """Return a bar for each shard, with its tokens summed over layers."""
    totals = [sum(column) for column in zip(*(layer.shard_tokens for layer in result.spread), strict=True)]
    totals.append(sum(layer.window_tokens for layer in result.spread))
    names = [f"shard {shard}" for shard in range(len(totals) - 1)] + ["window"]
    table = _table("Tokens by shard, all layers together", "", "")
    table.columns[1].justify = "left"
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for name, tokens in zip(names, totals, strict=True):
        bar = _bar(tokens / max(1, *totals), plain)
        table.add_row(name, bar, f"{tokens:,}", f"{tokens / max(1, sum(totals)):.1%}")
    followed = any(layer.expert_tokens for layer in result.spread)
    rule = "of the expert that the layer's router ranks first" if followed else "that follows from its position"
    return Group(table, f"A token is in the shard {rule}; the newest and the first stay in the window.")


def _layers(spread: Sequence[LayerSpread], plain: bool) -> Group:
    """Return a line for each layer, with a column of varying height for each shard and expert."""
    table = _table("Tokens by layer", "layer", "by shard", "least", "most", "by primary expert", "least", "most")
    for index in (1, 4):
        table.columns[index].justify = "left"
    for layer in spread:
        cells = [cell for counts in (layer.shard_tokens, layer.expert_tokens) for cell in _profile(counts, plain)]
        table.add_row(str(layer.layer), *cells)
    note = "Heights are relative to the line's largest number; least and most are shares of the line's sum."
    return Group(table, note)


def _profile(counts: Sequence[int], plain: bool) -> tuple[str, str, str]:
    """Return counts as a line of columns, with the smallest and the largest share."""
    total = sum(counts)
    if not total:
        return "-", "-", "-"
    return _columns(counts, plain), f"{min(counts) / total:.1%}", f"{max(counts) / total:.1%}"


def _columns(counts: Sequence[int], plain: bool) -> str:
    size = -(-len(counts) // _MAX_COLUMNS)
    groups = [sum(counts[start : start + size]) for start in range(0, len(counts), size)]
    levels = "12345678" if plain else _LEVELS
    # Rounded up: only nothing at all is drawn as nothing.
    heights = [-(-count * len(levels) // max(groups)) for count in groups]
    repeat, gap = (2, " ") if len(groups) <= 8 else (1, "")
    return gap.join((levels[height - 1] if height else ".") * repeat for height in heights)


def _bar(share: float, plain: bool) -> str:
    """Return a horizontal bar, `share` of the full width."""
    full, eighths = divmod(round(share * _BAR_WIDTH * 8), 8)
    if plain:
        return "#" * (full + (eighths >= 4))
    return "█" * full + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")
