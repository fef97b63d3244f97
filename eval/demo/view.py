"""How the demo's result is shown: tables of at most 80 columns that read without colour, or JSON."""

import contextlib
import json
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pikv_hf.eval.demo.good_for import describe_press_share, good_for
from pikv_hf.eval.demo.measure import Answer
from pikv_hf.eval.demo.result import DemoResult
from pikv_hf.eval.demo.token_spread import LayerSpread
from pikv_hf.reports.cache_stats import tier_tables
from pikv_hf.reports.fitting_table import FittingTable
from pikv_hf.reports.memory_report import format_bytes

WIDTH = 80
_BAR_WIDTH = 40
# Below this many parameters a step's time is that of its calls, whatever the cache.
_SMALL_MODEL = 100_000_000


def working(quiet: bool) -> contextlib.AbstractContextManager[object]:
    """Show on the error stream that the demo is running, unless `quiet` or not on a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return contextlib.nullcontext()
    return console.status("Answering with each cache")


def print_json(result: DemoResult) -> None:
    """Print the result as one JSON object."""
    print(json.dumps(result.to_dict()))


def print_result(result: DemoResult, console: Console | None = None) -> None:
    """Print the result as tables."""
    if console is None:
        console = Console(highlight=False)
        console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    for part in _parts(result, console.options.ascii_only):
        console.print(part)
        console.print()


def _parts(result: DemoResult, plain: bool) -> Iterator[RenderableType]:
    """Yield what is shown, the most important last: that is what stays on the screen."""
    yield _heading(result)
    if result.spread:
        yield _shards(result, plain)
    if len(result.per_device) > 1:
        yield _devices(result)
    if result.stats.tiers is not None:
        yield from tier_tables(result.stats.tiers)
    yield _answers(result, plain)
    if other := _other_answers(result):
        yield _listed("Wrong or other answers" if result.judged else "Other answers", other)
    yield _verdict(result)
    yield _costs(result)
    yield _listed("What each is good for", [(Text(name), Text(line)) for name, line in good_for(result).items()])


def _heading(result: DemoResult) -> Text:
    pikv = result.options.pikv
    example = f"Question 1: {result.questions[0]}\n" if result.judged else ""
    return Text.assemble(
        (f"One text, {len(result.questions)} questions, {len(result.caches)} caches\n", "bold"),
        f"{result.model} ({result.model_type}), {result.dtype} on {result.device}. With each cache it reads "
        f"{result.context_tokens:,} tokens once; then each question continues from its own copy of the cache.\n",
        example,
        f"PiKV: pages of {pikv.page_size} tokens, recent window of {pikv.recent_window}, {pikv.num_shards} shards.",
    )


def _table(title: str, *columns: str) -> Table:
    """Return an empty table whose first column is text and whose other columns are figures."""
    table = FittingTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table


def _listed(title: str, lines: Sequence[tuple[Text, Text]]) -> Table:
    """Return lines behind their names; what is too long for a line goes on below its beginning."""
    table = FittingTable(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column()
    for line in lines:
        table.add_row(*line)
    return table


# Answers


def _answers(result: DemoResult, plain: bool) -> Table:
    """Return the questions with what each cache made of them: right or wrong, or the same or not."""
    table = _table("Answers")
    table.collapse_padding = True
    table.add_column("", no_wrap=True)
    table.add_column("number of" if result.judged else "question", ratio=1)
    table.add_column("right answer" if result.judged else "DynamicCache's answer", ratio=1)
    for cache in result.caches:
        table.add_column(cache.cache, justify="right", no_wrap=True)
    for index, subject in enumerate(result.subjects):
        marks = [_mark(result, cache.answers[index], result.dynamic.answers[index], plain) for cache in result.caches]
        table.add_row(str(index + 1), _one_line(subject), _reference(result, index), *marks)
    table.add_section()
    table.add_row("", "right" if result.judged else "the same", "", *map(result.describe_answers, result.caches))
    return table


def _reference(result: DemoResult, index: int) -> Text:
    """Return the right answer, of a list of `key: value` the values, or `DynamicCache`'s answer if it is not known."""
    expected = result.expected[index]
    if expected is None:
        return _one_line(result.dynamic.answers[index].text)
    return _one_line(" ".join(part.rpartition(": ")[2] for part in expected.split(", ")))


def _mark(result: DemoResult, ours: Answer, theirs: Answer, plain: bool) -> str:
    """Return a sign of its own shape for right and wrong, or for the same as `DynamicCache`'s and not."""
    signs = ("ok", "XX", "=", "/=") if plain else ("✓", "✗", "=", "≠")
    if result.judged:
        return signs[0] if ours.right else signs[1]
    return signs[2] if ours.token_ids == theirs.token_ids else signs[3]


def _other_answers(result: DemoResult) -> list[tuple[Text, Text]]:
    """Return the wrong answers of `DynamicCache`, and those of other caches that are not the same as its."""
    found = []
    for index, theirs in enumerate(result.dynamic.answers):
        for cache in result.caches:
            ours = cache.answers[index]
            if ours.right is False if cache is result.dynamic else ours.token_ids != theirs.token_ids:
                found.append((Text(f"{index + 1}  {cache.cache}"), _one_line(ours.text)))
    return found


def _one_line(text: str) -> Text:
    """Return text from a model or file as it may go to a terminal: one line, no control characters, no markup."""
    line = " ".join(text.split())
    return Text("".join(character if character.isprintable() else "?" for character in line))


def _verdict(result: DemoResult) -> Text:
    same = "PiKVCache: the same tokens for every question"
    verdict = Text(same if result.agree else f"NOT THE SAME: {result.describe_disagreement()}", style="bold")
    return verdict.append(f"; logits within {result.logit_difference:.1e}.", style="not bold")


# Costs


def _seconds(amount: float) -> str:
    return f"{amount:.2f} s" if amount >= 1 else f"{amount * 1e3:.2f} ms"


_TIMES = (
    ("time to read the text", "prefill_seconds"),
    ("time to copy the cache", "copy_seconds"),
    ("time per further token", "token_seconds"),
)


def _costs(result: DemoResult) -> Group:
    table = _table("Costs", "", *(cache.cache for cache in result.caches))
    memory = {"memory of the text": "context_bytes", f"memory, {len(result.questions)} questions open": "open_bytes"}
    for label, attribute in memory.items():
        amounts = [getattr(cache, attribute) for cache in result.caches]
        table.add_row(label, *map(format_bytes, amounts))
        table.add_row("  of DynamicCache's", *(f"{amount / amounts[0]:.1%}" for amount in amounts))
    for label, attribute in _TIMES:
        amounts = [getattr(cache, attribute) for cache in result.caches]
        if None not in amounts:
            table.add_row(label, *map(_seconds, amounts))
    return Group(table, _notes(result))


def _notes(result: DemoResult) -> str:
    notes = ["Memory is counted from live storages; what copies share counts once."]
    if result.press is not None:
        notes.append(describe_press_share(result))
    notes.append("Times are of this run.")
    if result.parameters < _SMALL_MODEL:
        notes.append(
            f"At {result.parameters / 1e6:.1f}M parameters they are mostly overhead per call, whatever the cache "
            "holds: `pikv bench decode` times a layer of real size."
        )
    return " ".join(notes)


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
    table = _table("PiKVCache: tokens by shard, all layers together", "", "")
    table.columns[1].justify = "left"
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for name, tokens in zip(names, totals, strict=True):
        bar = _bar(tokens / max(1, *totals), plain)
        table.add_row(name, bar, f"{tokens:,}", f"{tokens / max(1, sum(totals)):.1%}")
    followed = any(layer.expert_tokens for layer in result.spread)
    rule = "of the expert that the layer's router ranks first" if followed else "that follows from its position"
    note = f"A token is in the shard {rule}; the newest and the first stay in the window."
    return Group(table, f"{note}{_by_layer(result.spread)}")


def _by_layer(spread: Sequence[LayerSpread]) -> str:
    """Return how much the largest shard of a layer has, as a sentence; nothing if all shards are empty."""
    largest = [max(layer.shard_tokens) / sum(layer.shard_tokens) for layer in spread if sum(layer.shard_tokens)]
    if not largest:
        return ""
    return f" Within a layer the largest shard has {min(largest):.1%} to {max(largest):.1%} of the tokens in shards."


def _bar(share: float, plain: bool) -> str:
    """Return a horizontal bar, `share` of the full width."""
    full, eighths = divmod(round(share * _BAR_WIDTH * 8), 8)
    if plain:
        return "#" * (full + (eighths >= 4))
    return "█" * full + (" ▏▎▍▌▋▊▉"[eighths] if eighths else "")
