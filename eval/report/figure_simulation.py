"""Draw many simulated devices: balance, memory, traffic and time against their number, next to what formulas say."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from pikv_hf.eval.report.style import GREY, SMALL, figure, series_style
from pikv_hf.planning.simulate.outcome import Outcome, Simulation

#: Legend entries; those of formulas are lines without markers.
LABELS = {
    "expert": "expert, never divided",
    "divided": "shards divided (PiKVCache)",
    "balanced": "balanced (EPLB, replicas)",
    "hash": "hash, page by page",
    "original": "original, (t%G) xor (e%G)",
}
_PAPER, _DENSE, _EVEN = (0, (4, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2))
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B"))


def simulation_figure(simulation: Simulation, path: Path | str) -> Path:
    """Draw four panels over the number of devices, and write a PNG.

    Parameters
    ----------
    simulation : Simulation
        Of at least two numbers of devices.
    path : Path or str
        The PNG to write.
    """
    with figure(8.0, Path(path)) as drawing:
        (balance, memory), (traffic, seconds) = drawing.subplots(2, 2)
        _balance(balance, simulation)
        _memory(memory, simulation)
        _traffic(traffic, simulation)
        _seconds(seconds, simulation)
        for axes in (balance, memory, traffic, seconds):
            _scale(axes, [claim.devices for claim in simulation.claims])
        drawing.legend(handles=_handles(simulation), loc="outside lower center", ncols=3, columnspacing=1.4)
        drawing.suptitle(_title(simulation), fontsize=11, x=0.01, ha="left")
    return Path(path)


def _title(simulation: Simulation) -> str:
    options = simulation.options
    rows = f"{options.batch} sequences" if options.batch > 1 else "one sequence"
    return (
        f"{simulation.model}, {rows} of {options.context:,} tokens, {simulation.device}, "
        f"trace: {simulation.trace.removeprefix('synthetic, ')}"
    )


def _balance(axes: Any, simulation: Simulation) -> None:
    axes.set_title("Memory balance")
    _placements(axes, simulation, lambda outcome: outcome.balance)
    axes.axhline(1, color=GREY, linewidth=1, linestyle=_EVEN)
    axes.set_ylabel("fullest device / mean")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0.94, None)


def _memory(axes: Any, simulation: Simulation) -> None:
    axes.set_title("K/V of the fullest device")
    _placements(axes, simulation, lambda outcome: outcome.bytes_max)
    _formula(axes, simulation, [claim.paper_bytes for claim in simulation.claims], _PAPER)
    _formula(axes, simulation, [claim.even_bytes for claim in simulation.claims], _EVEN)
    _formula(axes, simulation, [simulation.total_bytes] * len(simulation.claims), _DENSE)
    _bytes_axis(axes)


def _traffic(axes: Any, simulation: Simulation) -> None:
    axes.set_title("Received per device, layer and step")
    _placements(axes, simulation, lambda outcome: outcome.routed_bytes, zorder=2)
    outcomes = simulation.of(simulation.outcomes[0].placement)
    counts = [outcome.devices for outcome in outcomes]
    axes.plot(counts, [outcome.received_bytes for outcome in outcomes], color="black", linewidth=2, zorder=3)
    _formula(axes, simulation, [simulation.moved_kv_bytes] * len(simulation.claims), _DENSE)
    _note(axes, counts[0], simulation.moved_kv_bytes, "K/V sent to the query")
    _note(axes, counts[-1], outcomes[-1].received_bytes, "parts of all devices", right=True)
    lowest = min(outcome.routed_bytes for outcome in simulation.outcomes)
    _note(axes, counts[0], lowest, "markers: of the devices with one expert's pages")
    _bytes_axis(axes)
    axes.set_ylim(lowest / 5, simulation.moved_kv_bytes * 2)


def _seconds(axes: Any, simulation: Simulation) -> None:
    axes.set_title("Attention and merging of a step, all layers")
    _placements(axes, simulation, lambda outcome: 1e3 * outcome.attention_seconds, dashed=True)
    _placements(axes, simulation, lambda outcome: 1e3 * outcome.step_seconds)
    _formula(axes, simulation, [1e3 * claim.paper_seconds for claim in simulation.claims], _PAPER)
    _formula(axes, simulation, [1e3 * simulation.dense_seconds] * len(simulation.claims), _DENSE)
    best = min(1e3 * outcome.attention_seconds for outcome in simulation.outcomes)
    _note(axes, simulation.claims[0].devices, best, "hollow: attention alone, without merging")
    axes.set_ylabel("ms")
    axes.set_yscale("log")
    axes.set_ylim(best / 4, None)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _placements(
    axes: Any, simulation: Simulation, value: Callable[[Outcome], float], *, dashed: bool = False, zorder: float = 2.5
) -> None:
    for index, name in enumerate(_names(simulation)):
        outcomes, style = simulation.of(name), series_style(index)
        axes.plot(
            [outcome.devices for outcome in outcomes],
            [value(outcome) for outcome in outcomes],
            color=style.colour,
            marker=style.marker,
            markersize=4.5 if dashed else 5.5,
            markerfacecolor="white" if dashed else style.colour,
            linewidth=0.8 if dashed else 1.4,
            zorder=zorder - 0.2 * dashed,
        )


def _formula(axes: Any, simulation: Simulation, values: Sequence[float], dashes: Any) -> None:
    counts = [claim.devices for claim in simulation.claims]
    axes.plot(counts, values, color="black", linewidth=1.2, linestyle=dashes, zorder=2.2)


def _note(axes: Any, count: int, value: float, text: str, right: bool = False) -> None:
    """Write a line's name below its left end, or above its right one."""
    axes.annotate(
        *(text, (count, value), (0, 7 if right else -7)),
        textcoords="offset points",
        va="bottom" if right else "top",
        ha="right" if right else "left",
        fontsize=SMALL - 1,
        color=GREY,
    )


def _scale(axes: Any, counts: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(counts)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("devices, G")
    axes.grid(True, axis="both")


def _bytes_axis(axes: Any) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _in_units(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _in_units(value: float) -> str:
    size, unit = next((size, unit) for size, unit in _UNITS if value >= size)
    return f"{value / size if size else value:g} {unit}"


def _names(simulation: Simulation) -> list[str]:
    return list(dict.fromkeys(outcome.placement for outcome in simulation.outcomes))


def _handles(simulation: Simulation) -> list[Line2D]:
    placements = [series_style(index).handle(LABELS[name]) for index, name in enumerate(_names(simulation))]
    formulas = ((_PAPER, "PiKV's claim: L/G + L/E"), (_DENSE, "dense: L on every device"), (_EVEN, "even: L/G"))
    return placements + [Line2D([], [], color="black", linestyle=dashes, label=text) for dashes, text in formulas]
