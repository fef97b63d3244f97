"""Which devices and codec a plan recommends, and why: what is exact first, and no more than is needed."""

import dataclasses
from typing import Any

from pikv_hf.config import PiKVConfig
from pikv_hf.reports.memory_report import format_bytes

from .cache_memory import budget_text
from .plan import RESERVE, Copies, Layout, Row, Workload, lay_out

#: Twice the devices must save so much of a step to be worth renting.
WORTH = 0.15

#: A codec that is not needed must save so much of a step to be recommended: it costs accuracy.
WORTH_A_CODEC = 1 / 3

#: Tried in this order where nothing was asked for.
CODECS = ("none", "int8", "int4")


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A workload's layout with what is recommended.

    Attributes
    ----------
    layout : Layout
        Of the options that were asked for.
    chosen : Layout
        Of the options recommended; the same unless another codec is needed or pays.
    row : Row or None
        Recommended of `chosen`, None if nothing fits.
    recommendation : str
        One sentence.
    notes : tuple of str
        What else one should know.
    """

    layout: Layout
    chosen: Layout
    row: Row | None
    recommendation: str
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        work, model = self.layout.workload, self.layout.workload.model
        shape = {name: getattr(model, name) for name in ("name", "params", "routed_params", "dtype", "max_positions")}
        sizes = {"weight_bytes": model.weight_bytes, "layers": len(model.layers), "paged": len(model.paged_layers)}
        return {
            "model": {**shape, **sizes, "active_params": model.active_params()},
            "device": work.device.to_dict(),
            "devices": work.devices,
            "context": work.tokens,
            "batch": work.batch,
            "options": work.options.to_dict(),
            "usable_bytes": work.usable,
            "bytes_per_token_and_layer": dataclasses.asdict(self.layout.per_token),
            "capacity": dataclasses.asdict(self.layout.capacity),
            "rows": [row.to_dict() for row in self.layout.rows],
            "copies": [dataclasses.asdict(each) for each in self.layout.copies],
            "saves_time_from_tokens": {str(number): most for number, most in self.layout.crossovers.items()},
            "recommended": None
            if self.row is None
            else {
                "devices": self.row.devices,
                "mode": self.row.mode,
                "key_codec": self.chosen.workload.options.key_codec,
                "value_codec": self.chosen.workload.options.value_codec,
                "routing": self.chosen.workload.options.routing,
                "budget": self.chosen.workload.options.budget,
                **self.row.to_dict(),
            },
            "recommendation": self.recommendation,
            "notes": list(self.notes),
        }


def make_plan(workload: Workload, *, fixed_codec: bool = False) -> Plan:
    """Lay a workload out and recommend.

    Parameters
    ----------
    workload : Workload
        Its routing and budget are taken as they are.
    fixed_codec : bool
        Whether its codecs were asked for, so that no others are tried; any but `"none"` were.
    """
    asked = lay_out(workload)
    options = workload.options
    fixed = fixed_codec or (options.key_codec, options.value_codec) != ("none", "none")
    layouts = {options.key_codec: asked}
    chosen, row = asked, best_row(asked)
    for codec in () if fixed else CODECS[1:]:
        layouts[codec] = lay_out(dataclasses.replace(workload, options=_with_codec(options, codec)))
        if row is None:
            chosen, row = layouts[codec], best_row(layouts[codec])
    if row is None:
        # What comes closest is shown: the narrowest codec, unless no codec could help.
        last = asked if asked.rows[-1].weight_bytes > workload.usable else list(layouts.values())[-1]
        return Plan(asked, last, None, _nothing_fits(last), _notes(asked, last, None, layouts))
    exact = chosen
    if not fixed and chosen is asked:
        for codec in CODECS[1:]:
            other = best_row(layouts[codec])
            if other is not None and other.devices <= row.devices and _saving(other, row) >= WORTH_A_CODEC:
                chosen, row = layouts[codec], other
                break
    return Plan(asked, chosen, row, _sentence(asked, exact, chosen, row), _notes(asked, chosen, row, layouts))


def best_row(layout: Layout) -> Row | None:
    """Return the fewest devices that have room; more only where each doubling saves enough of a step."""
    best: Row | None = None
    for row in layout.rows:
        if row.fits and (best is None or _saving(row, best) >= 1 - (1 - WORTH) ** _doublings(row, best)):
            best = row
    return best


def _doublings(row: Row, best: Row) -> int:
    return max(1, (row.devices // best.devices).bit_length() - 1)


def _saving(row: Row, other: Row) -> float:
    """Return the share of the step of `other` that `row` does without."""
    return 1 - row.step.total / other.step.total


def _with_codec(options: PiKVConfig, codec: str) -> PiKVConfig:
    return dataclasses.replace(options, key_codec=codec, value_codec=codec)


def _codec_text(options: PiKVConfig) -> str:
    names = dict.fromkeys((options.key_codec, options.value_codec))
    return "no codec" if list(names) == ["none"] else "/".join(names)


def _routing_text(options: PiKVConfig) -> str:
    return "no routing" if options.routing == "all" else f"{options.routing}:{options.max_pages}"


def describe(options: PiKVConfig) -> str:
    """Return `"int4, no routing"`, with a budget if there is one."""
    parts = [_codec_text(options), _routing_text(options)]
    return ", ".join(parts if options.budget is None else [*parts, f"a budget of {budget_text(options)}"])


def _sentence(asked: Layout, exact: Layout, chosen: Layout, row: Row) -> str:
    work, options = asked.workload, chosen.workload.options
    name, how = work.device.name, describe(options)
    if row.devices == 1:
        text = f"One {name} is enough: {how}"
    elif row.mode == "processes":
        text = f"Shard over {row.devices} {name}, a process each: {how}"
    else:
        text = f"Spread one process over {row.devices} {name}: {how}"
    return f"{text}; {_reason(asked, exact, chosen, row)}."


def _reason(asked: Layout, exact: Layout, chosen: Layout, row: Row) -> str:
    if chosen is not exact:
        before = best_row(exact)
        assert before is not None
        return f"the codec saves {_saving(row, before):.0%} of a step, {_ms(before)} without it"
    where = "" if row.devices == 1 else " on each"
    room = f"it takes {format_bytes(row.needed)} of {format_bytes(row.usable)}{where}"
    fewer = [each for each in chosen.rows if each.devices < row.devices]
    reasons = [room]
    if chosen is not asked:
        most = asked.rows[-1]
        lacking = format_bytes(most.needed - most.usable)
        each_device = "" if most.devices == 1 else " each"
        reasons.append(f"without the codec {_devices(most.devices)} would lack {lacking}{each_device}")
    if fewer and not fewer[-1].fits:
        lacking = format_bytes(fewer[-1].needed - fewer[-1].usable)
        each_device = "" if fewer[-1].devices == 1 else " each"
        reasons.append(f"{_devices(fewer[-1].devices)} would lack {lacking}{each_device}")
    elif fewer:
        reasons.append(f"a step takes {_ms(row)} instead of {_ms(fewer[-1])} on {fewer[-1].devices}")
    more = [each for each in chosen.rows if each.devices > row.devices]
    if more:
        saved = _saving(more[0], row)
        verb = f"save only {saved:.0%} of a step" if saved > 0 else f"make a step {-saved:.0%} longer"
        reasons.append(f"{more[0].devices} would {verb}")
    return ", ".join(reasons)


def _devices(number: int) -> str:
    return "one device" if number == 1 else f"{number} devices"


def _ms(row: Row) -> str:
    return f"{row.step.total * 1e3:.1f} ms"


def _nothing_fits(layout: Layout) -> str:
    work, row = layout.workload, max(layout.rows, key=lambda each: each.usable - each.needed)
    usable = f"{format_bytes(row.usable)} of {work.device.name} are usable"
    if row.weight_bytes > row.usable:
        return (
            f"It does not fit: weights alone take {format_bytes(row.weight_bytes)} on each of {row.devices}, {usable}."
        )
    most = f"{row.devices} {work.device.name} with {describe(work.options)}"
    return (
        f"It does not fit: {most} lack {format_bytes(row.needed - row.usable)} each; they have room for a context of "
        f"{row.max_context:,} at batch {work.batch}, or for batch {row.max_batch} at this context."
    )


def _notes(asked: Layout, chosen: Layout, row: Row | None, layouts: dict[str, Layout]) -> tuple[str, ...]:
    work = asked.workload
    notes = []
    if work.model.max_positions is not None and work.tokens > work.model.max_positions:
        notes.append(
            f"The config has {work.model.max_positions:,} positions, fewer than the context of {work.tokens:,}: the "
            "model needs a RoPE scaling for it."
        )
    if row is not None and row.devices > 1 and (copies := _better_copies(chosen, row)) is not None:
        notes.append(
            f"If the {work.batch} sequences need not be one batch, divide them: {copies.devices} processes with "
            f"{copies.batch} each that share nothing take {copies.step_seconds * 1e3:.1f} ms per step instead of "
            f"{_ms(row)}. Sharding is for sequences too long or too few for that."
        )
    if row is not None and chosen is asked and "int4" in layouts and chosen is not layouts["int4"]:
        other = next(each for each in layouts["int4"].rows if each.devices == row.devices)
        if (saved := _saving(other, row)) >= 0.05:
            notes.append(
                f"int4 would take {format_bytes(row.kv.total - other.kv.total)} less on each device and save "
                f"{saved:.0%} of a step; it is not exact."
            )
    notes += _saves_time(chosen)
    notes.append(
        f"{RESERVE:.0%} of a device's memory is left for activations and buffers. Steps are estimates: nothing "
        "overlaps, host work and launches are assumed, not measured."
    )
    return tuple(notes)


def _better_copies(layout: Layout, row: Row) -> Copies | None:
    """Return as many copies of the model, where they fit and are faster; None if there are too few sequences."""
    copies = next(each for each in layout.copies if each.devices == row.devices)
    possible = copies.fits and layout.workload.batch >= copies.devices
    return copies if possible and copies.step_seconds < row.step.total else None


def _saves_time(layout: Layout) -> list[str]:
    batch, lines = layout.workload.batch, []
    for number, tokens in layout.crossovers.items():
        if tokens is None:
            lines.append(f"over {number} never saves time")
        else:
            lines.append(f"over {number} saves time from {tokens:,} tokens")
    return [f"At batch {batch}, sharding {', '.join(lines)}."] if lines else []
