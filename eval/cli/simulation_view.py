"""``pikv plan --simulate``: a trace replayed on many simulated devices, as a table, JSON and a figure."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console

from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.output_files import check_output_file
from pikv_hf.eval.report.result_rows import write_rows
from pikv_hf.planning.model_shape import ModelShape
from pikv_hf.planning.plan import Workload
from pikv_hf.planning.simulate.outcome import Outcome, Simulation, SimulationOptions
from pikv_hf.planning.simulate.routing_trace import Popularity, RoutingTrace, load_trace, synthetic_trace
from pikv_hf.planning.simulate.simulation import COUNTS, simulate
from pikv_hf.reports.fitting_table import FittingTable

#: Of traces that are made up: how often a token goes where the one before went, and the seed.
STICKINESS, SEED = 0.3, 0
_COLUMNS = (
    "devices",
    "holding",
    "fullest",
    "of mean",
    "per layer",
    "devices/expert",
    "re-plans",
    "moved",
    "received",
    "one expert",
    "attention",
    "merging",
)
_NOTES = (
    "holding: devices with any page; fullest, of mean: K/V of the fullest device, window included; per layer: the same "
    "ratio in a layer, pages alone.\n"
    "received: by each device in a layer and step to merge all parts; one expert: the same for a step that reads one "
    "expert's pages. attention, merging: of a step, all layers; weights and launches come on top, see pikv plan."
)


def make_trace(shape: ModelShape, context: int, file: Path | None, skew: float | None) -> RoutingTrace:
    """Return the trace of a file, or one that is made up for a model.

    Parameters
    ----------
    shape : ModelShape
        Of the model.
    context : int
        Tokens of the made-up trace.
    file : Path, optional
        As :func:`~pikv_hf.planning.simulate.routing_trace.save_trace` wrote it.
    skew : float, optional
        Of the made-up trace, by default 1.

    Raises
    ------
    InputError
        If both a file and a skew are given, the file cannot be read, or the model has no routers.
    """
    if file is not None:
        if skew is not None:
            raise InputError(f"--trace {file} has a skew of its own, --skew {skew:g} is for synthetic traces")
        with user_input(f"cannot read --trace {file}"):
            return load_trace(file)
    experts = max((layer.experts for layer in shape.paged_layers), default=0)
    if not experts:
        raise InputError(f"{shape.name} has no paged layer with a router to simulate")
    with user_input("invalid --skew"):
        chosen = 1.0 if skew is None else skew
        return synthetic_trace(len(shape.paged_layers), experts, context, Popularity(chosen, STICKINESS), SEED)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulationRequest:
    """What `pikv plan --simulate` was asked for beside the workload.

    Attributes
    ----------
    trace : Path or None
        File of a routing trace; by default one is made up.
    skew : float or None
        Of the made-up trace.
    plot, output : Path or None
        PNG and JSON files to write.
    """

    trace: Path | None = None
    skew: float | None = None
    plot: Path | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        for name in ("plot", "output"):
            file = getattr(self, name)
            if file is not None and not file.parent.is_dir():
                raise InputError(f"--{name} {file}: no folder {file.parent}")
            check_output_file(file, f"--{name}")


def simulate_and_show(workload: Workload, request: SimulationRequest, as_json: bool) -> None:
    """Simulate a workload on 16 to 512 devices, print what was found and write the files asked for.

    Raises
    ------
    InputError
        If an option or a file cannot be used; what a simulation does not know is refused.
    """
    simulation = run_simulation(workload, request)
    if as_json:
        print(json.dumps(simulation.to_dict()))
    else:
        print_simulation(simulation, Console())
    if request.output is not None:
        with user_input(f"cannot write --output {request.output}"):
            write_simulation(simulation, request.output)
    if request.plot is not None:
        plot_simulation(simulation, request.plot)


def run_simulation(workload: Workload, request: SimulationRequest, counts: Sequence[int] | None = None) -> Simulation:
    """Simulate a workload on `counts` devices, by default those asked for, if several, and 16 to 512.

    Raises
    ------
    InputError
        If an option or a file cannot be used.
    """
    options = workload.options
    if (options.key_codec, options.value_codec, options.routing) != ("none", "none", "all") or options.budget:
        raise InputError("--simulate keeps and reads everything: it takes no --codec, --routing or --budget")
    if counts is None:
        counts = sorted({*COUNTS, *([workload.devices] if workload.devices > 1 else [])})
    trace = make_trace(workload.model, workload.tokens, request.trace, request.skew)
    with user_input("cannot simulate"):
        simulated = SimulationOptions(
            context=workload.tokens,
            batch=workload.batch,
            page_size=options.page_size,
            recent_window=options.recent_window,
            sink_tokens=options.sink_tokens,
        )
        return simulate(trace, workload.model, workload.device, simulated, counts=counts)


def plot_simulation(simulation: Simulation, file: Path) -> None:
    """Draw a simulation into a PNG file.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    from pikv_hf.eval.report.figure_simulation import simulation_figure

    with user_input(f"cannot write --plot {file}"):
        simulation_figure(simulation, file)


def write_simulation(simulation: Simulation, file: Path) -> None:
    """Write a simulation as JSON, a row for each outcome, with where it comes from."""
    about = simulation.to_dict()
    tables = {name: about.pop(name) for name in ("outcomes", "claims")}
    for outcome in tables["outcomes"]:
        outcome["balance_over_time"] = [round(balance, 4) for balance in outcome["balance_over_time"]]
    write_rows(file, about, tables)


def print_simulation(simulation: Simulation, console: Console) -> None:
    """Print a table of all outcomes, and what they are to be compared with."""
    options = simulation.options
    rows = f"{options.batch} sequences" if options.batch > 1 else "one sequence"
    title = (
        f"{simulation.model} on simulated {simulation.device}: {rows} of {options.context:,} tokens, "
        f"{simulation.layers} layers, {simulation.experts} experts ({simulation.trace})"
    )
    table = FittingTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("placement", no_wrap=True)
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for placement in dict.fromkeys(outcome.placement for outcome in simulation.outcomes):
        for outcome in simulation.of(placement):
            table.add_row(placement, *_cells(outcome))
        table.add_section()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 150
    console.print(table)
    console.print(_NOTES, highlight=False)
    console.print(_reference(simulation), highlight=False)


def _cells(outcome: Outcome) -> list[str]:
    return [
        f"{outcome.devices}",
        f"{outcome.holders}",
        amount(outcome.bytes_max),
        f"{outcome.balance:.2f}",
        f"{outcome.layer_balance:.2f}",
        f"{outcome.devices_per_expert:.1f}",
        f"{outcome.replans}" if outcome.replans else "-",
        amount(outcome.moved_bytes) if outcome.moved_bytes else "-",
        amount(outcome.received_bytes),
        amount(outcome.routed_bytes),
        f"{1e3 * outcome.attention_seconds:.3g} ms",
        f"{1e3 * outcome.merge_seconds:.3g} ms",
    ]


def _reference(simulation: Simulation) -> str:
    claims = ", ".join(f"{amount(claim.paper_bytes)} for {claim.devices}" for claim in simulation.claims)
    return (
        f"Dense, all on one device: {amount(simulation.total_bytes)} and {1e3 * simulation.dense_seconds:.3g} ms of "
        f"attention.\nPiKV's L/G + L/E tokens per device: {claims}."
    )


def amount(size: float) -> str:
    """Return bytes in decimal units, three digits."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
