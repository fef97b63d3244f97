"""Show a plan: tables of at most 80 columns that read without colour, sentences of at most 100, or JSON."""

import json

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pikv_hf.planning.plan import Layout, Row
from pikv_hf.planning.recommend import Plan, describe
from pikv_hf.reports.fitting_table import light_table
from pikv_hf.reports.memory_report import format_bytes

#: Columns; lines longer than these are hard to read in any terminal.
MOST = 100


def print_plan_json(plan: Plan) -> None:
    """Print the plan as one JSON object."""
    print(json.dumps(plan.to_dict()))


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the plan as tables and sentences."""
    if console is None:
        console = Console(highlight=False)
        # 80 where there is neither a terminal nor COLUMNS.
        console.width = min(console.width, MOST)
    parts: list[RenderableType] = [_heading(plan), _memory(plan.chosen), _time(plan.chosen), _traffic(plan.chosen)]
    parts += [_capacity(plan.chosen), _advice(plan)]
    for part in parts:
        console.print(part)
        console.print()


def _heading(plan: Plan) -> Text:
    work, model = plan.layout.workload, plan.layout.workload.model
    counts = {
        "sliding": sum(bool(layer.sliding) for layer in model.layers),
        "with states": sum(bool(layer.state_bytes) for layer in model.layers),
    }
    others = "".join(f", {count} of them {kind}" for kind, count in counts.items() if count)
    each = plan.chosen.per_token
    kept = ""
    if each.stored != each.plain:
        kept = f", {_small(each.stored)} as {describe(plan.chosen.workload.options).partition(',')[0]}"
    title = f"{model.name}: context {work.tokens:,}, batch {work.batch}, up to {work.devices} x {work.device.name}"
    return Text.assemble(
        (f"{title}\n", "bold"),
        f"{model.params / 1e9:.1f}B parameters, {model.active_params() / 1e9:.1f}B of them per token, "
        f"{format_bytes(model.weight_bytes)}; {len(model.layers)} layers{others}. A token takes "
        f"{_small(each.plain)} per paged layer as it comes{kept}, and {each.bookkeeping:.1f} B of bookkeeping.",
    )


def _small(size: float) -> str:
    return f"{size:,.0f} B" if size < 10_000 else format_bytes(size)


def _memory(layout: Layout) -> Table:
    work = layout.workload
    title = f"Memory of the fullest device ({describe(work.options)}), {format_bytes(work.usable)} usable"
    shown = light_table(title, "devices", "weights", "K/V", "together", "fits", "longest\ncontext", "largest\nbatch")
    for row in layout.rows:
        sizes = format_bytes(row.weight_bytes), format_bytes(row.kv.total), format_bytes(row.needed)
        most = f"{row.max_context:,}" if row.max_context else "-", f"{row.max_batch:,}" if row.max_batch else "-"
        shown.add_row(_name(row), *sizes, "yes" if row.fits else "no", *most)
    return shown


def _time(layout: Layout) -> Table:
    title = "A decoding step of the whole batch, estimated: milliseconds"
    shown = light_table(title, "devices", "weights", "attention", "exchange", "overhead", "step", "tokens/s")
    for row in layout.rows:
        step = row.step
        spent = [f"{x * 1e3:.1f}" for x in (step.weights, step.attention, step.exchange, step.overhead, step.total)]
        shown.add_row(str(row.devices), *spent, f"{row.tokens_per_second:,.0f}")
    return shown


def _traffic(layout: Layout) -> Table:
    shown = light_table("Bytes of a device per token", "devices", "read", "sent")
    for row in layout.rows:
        shown.add_row(str(row.devices), format_bytes(row.read_bytes), format_bytes(row.sent_bytes))
    return shown


def _name(row: Row) -> str:
    if row.devices == 1:
        return "1"
    return f"{row.devices} processes" if row.mode == "processes" else f"{row.devices} in one process"


def _capacity(layout: Layout) -> Text:
    room, shards = layout.capacity, layout.workload.options.num_shards
    return Text(
        f"Shards: of {shards}, the most loaded gets {room.load:.1%} of a sequence, {room.expected:,.0f} tokens per "
        f"layer; S = {room.tokens:,} (z = {room.z:g}) is too few with probability {_probability(room.overflow)}, for "
        f"any shard at most {_probability(room.any_overflow)}."
    )


def _probability(chance: float) -> str:
    return f"{chance:.2%}" if chance >= 1e-4 else f"{chance:.0e}"


def _advice(plan: Plan) -> Text:
    text = Text(plan.recommendation, style="bold")
    for note in plan.notes:
        text.append(f"\n- {note}", style="not bold")
    return text
