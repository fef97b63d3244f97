"""``pikv plan``: what a model, a context and a batch need on given devices, before any is rented."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pikv_hf.config import PiKVConfig
from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.hub import impatient_hub

if TYPE_CHECKING:
    from pikv_hf.planning.plan import Workload

#: Configs that are known without network.
MODEL_CONFIGS = Path(__file__).parents[1] / "model_configs"
_DEFAULT = PiKVConfig()


def plan(
    model: Annotated[str, typer.Option(help="Bundled name, folder, config.json or Hub name.")],
    context: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 32768,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    devices: Annotated[str, typer.Option(help="Kind and number, such as 8xH200.")] = "1xH100",
    codec: Annotated[
        str | None, typer.Option(help="Of keys and values; by default none, unless one is needed.")
    ] = None,
    key_codec: Annotated[str | None, typer.Option(help="Of keys.")] = None,
    value_codec: Annotated[str | None, typer.Option(help="Of values.")] = None,
    routing: Annotated[str, typer.Option(help="all, or a policy and the pages it reads: page_bound:64.")] = "all",
    budget: Annotated[str | None, typer.Option(help="What may be stored: 0.25, 4096 (tokens) or 2GiB.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="processes or devices (of one process); by default what fits.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens per page.")] = _DEFAULT.page_size,
    recent_window: Annotated[int, typer.Option(help="Newest tokens, not in a shard.")] = _DEFAULT.recent_window,
    num_shards: Annotated[int, typer.Option(help="Groups of experts.")] = _DEFAULT.num_shards,
    dtype: Annotated[
        str | None, typer.Option(help="Of K/V: float32, float16, bfloat16; by default the config's.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="How weights are stored: bfloat16, fp8, int4, mxfp4...")] = None,
    trace: Annotated[Path | None, typer.Option(help="Routing trace, for measured loads of shards.")] = None,
    z: Annotated[float, typer.Option("--z", help="Margin of the capacity of shards, in standard deviations.")] = 3.0,
    calibrate: Annotated[bool, typer.Option(help="Measure this machine's CPU, for --devices cpu.")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Instead, replay --trace on 16 to 512 simulated devices.")
    ] = False,
    skew: Annotated[
        float | None, typer.Option(help="With --simulate, Zipf skew of a made-up trace; 1 without --trace.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --simulate, PNG to draw.")] = None,
    output: Annotated[Path | None, typer.Option(help="With --simulate, JSON file to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """What fits on how many devices, how long a step takes, and what to do: from the model's config alone.

    No weights are loaded, and with a bundled or local config nothing is
    downloaded. Exact options are recommended first; codec, routing and
    budget are taken as given.
    """
    with user_input("invalid option"):
        read = {**parse_routing(routing), **({} if budget is None else {"budget": parse_budget(budget)})}
    storage = {
        "key_codec": key_codec or codec or "none",
        "value_codec": value_codec or codec or "none",
        "page_size": page_size,
        "recent_window": recent_window,
        "num_shards": num_shards,
        **read,
    }
    given = {"mode": mode, "z": z}
    simulated = {"skew": skew, "plot": plot, "output": output}
    _check_simulated(simulate, simulated)
    workload = _workload(model, context, batch, devices, storage, given, dtype, weights, trace, calibrate)
    fixed = any(each is not None for each in (codec, key_codec, value_codec))
    if simulate:
        _simulate(workload, {"trace": trace, **simulated}, as_json)
    else:
        _show(workload, fixed, as_json)


def _check_simulated(simulate: bool, options: dict[str, Any]) -> None:
    if not simulate:
        for name, value in options.items():
            if value is not None:
                raise InputError(f"--{name} {value} needs --simulate")


def _simulate(workload: "Workload", request: dict[str, Any], as_json: bool) -> None:
    from pikv_hf.eval.cli.simulation_view import SimulationRequest, simulate_and_show

    simulate_and_show(workload, SimulationRequest(**request), as_json)


def parse_routing(text: str) -> dict[str, Any]:
    """Return the options that `"page_bound:64"`, `"page_bound:0.1"` or `"all"` means; names are checked later."""
    name, _, most = text.partition(":")
    if not most:
        return {"routing": name}
    return {"routing": name, "max_pages": _number(most)}


def parse_budget(text: str) -> str | int | float:
    """Return `"4096"` as tokens, `"0.25"` as a share, `"2GiB"` as it is."""
    return _number(text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _workload(
    model: str,
    context: int,
    batch: int,
    devices: str,
    storage: dict[str, Any],
    given: dict[str, Any],
    dtype: str | None,
    weights: str | None,
    trace: Path | None,
    calibrate: bool,
) -> "Workload":
    with user_input("invalid option"):
        options = PiKVConfig.from_dict(storage)
        from pikv_hf.planning.hardware import parse_devices
        from pikv_hf.planning.model_shape import bundled_config, load_config, shape_of
        from pikv_hf.planning.plan import Workload

        number, device = parse_devices(devices)
        if given["mode"] not in (None, "processes", "devices"):
            raise ValueError(f"mode must be 'processes' or 'devices', got {given['mode']!r}")
        if calibrate and device.name != "cpu":
            raise ValueError(f"--calibrate measures a CPU, but --devices is {device.name}")
    here = Path(model).exists() or bundled_config(model, MODEL_CONFIGS) is not None
    with user_input("cannot use --model"), contextlib.nullcontext() if here else impatient_hub():
        shape = shape_of(load_config(model, MODEL_CONFIGS), model, dtype, weights)
    with user_input(f"cannot use --trace {trace}"):
        loads = None if trace is None else trace_loads(trace, options.num_shards)
    with user_input("invalid option"):
        workload = Workload(shape, context, batch, device, number, options, loads=loads, **given)
    if calibrate:
        from pikv_hf.planning.calibration import calibrated_cpu

        workload = dataclasses.replace(workload, device=calibrated_cpu())
    return workload


def trace_loads(path: Path, shards: int) -> tuple[float, ...]:
    """Return the shares of the shards of the layer that is loaded most unevenly in a routing trace."""
    from pikv_hf.planning.capacity import measured_loads
    from pikv_hf.planning.simulate.routing_trace import load_trace

    return max((measured_loads(counts.tolist(), shards) for counts in load_trace(path).loads()), key=max)


def _show(workload: "Workload", fixed: bool, as_json: bool) -> None:
    from pikv_hf.eval.cli.plan_view import print_plan, print_plan_json
    from pikv_hf.planning.recommend import make_plan

    with user_input("invalid option"):
        made = make_plan(workload, fixed_codec=fixed)
    (print_plan_json if as_json else print_plan)(made)
