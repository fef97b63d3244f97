"""Print a run as it goes: a line per operation and kind checked, every red check, a line per measurement."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from pikv_hf.eval.gpu.attention_speed import AttentionSpeed
from pikv_hf.eval.gpu.checks import Check, PlannedCheck, dtype_name
from pikv_hf.eval.gpu.latent_speed import LatentSpeed
from pikv_hf.eval.gpu.list_speed import ListSpeed
from pikv_hf.eval.gpu.page_speed import PageSpeed
from pikv_hf.eval.gpu.sweep import SweepRow

ATTENTION_HEADER = "geometry       batch x tokens  kind         ms   GB/s  of copy  dense ms  times as fast"
LATENT_HEADER = (
    "latents        batch x tokens  kind             ms   GB/s  of copy  TFLOPS  matmuls ms, x     expanded ms, x"
)
LIST_HEADER = (
    "steps          batch x tokens  kinds                    ms   GB/s  of copy     dense ms, x     DynamicCache ms, x"
)
PAGE_HEADER = "operation     kind  case                                        ms   GB/s  of copy"


def check_lines(results: Iterable[Check | PlannedCheck]) -> Iterator[str]:
    """Yield a line whenever operation or dtype changes, and one per red check, as the checks are run."""
    for (operation, dtype), group in itertools.groupby(results, key=_operation_and_dtype):
        seen = list(group)
        checks = [result for result in seen if isinstance(result, Check)]
        worst = max(
            (check.max_error / check.bound for check in checks if check.ok and check.max_error and check.bound),
            default=0.0,
        )
        wrong = [line for line in map(_wrong_line, seen) if line]
        what = f"{operation:<23} {dtype:<9} {len(checks):>3} results, at most {worst:.0%} of the bound"
        yield f"{'   ' if wrong else 'ok '} {what}"
        yield from wrong


def _operation_and_dtype(result: Check | PlannedCheck) -> tuple[str, str]:
    return result.operation, dtype_name(result.dtype) if isinstance(result, PlannedCheck) else result.dtype


def _wrong_line(result: Check | PlannedCheck) -> str:
    if isinstance(result, PlannedCheck):
        return f"      NOT RUN  {result.kind}, {result.case}"
    return "" if result.ok else f"      RED      {result.kind}, {result.name}: {_why(result)}"


def _why(check: Check) -> str:
    return check.note or f"error {check.max_error:.3g}, bound {check.bound:.3g}"


def attention_line(speed: AttentionSpeed) -> str:
    """Return the line of a measurement of attention."""
    case = f"{speed.geometry:<14} {f'{speed.batch} x {speed.tokens}':>14}  {speed.kind:<5}"
    if speed.timing is None:
        return f"{case} {speed.note}"
    dense = "        -              -"
    if speed.sdpa_ms is not None:
        dense = f"{speed.sdpa_ms:9.3f} {speed.sdpa_ratio:13.2f}x"
    return f"{case} {speed.timing.p50_ms:9.3f} {speed.gb_per_s:6.0f} {speed.copy_share:8.0%} {dense}"


def latent_line(speed: LatentSpeed) -> str:
    """Return the line of a measurement of latent attention."""
    case = f"{speed.geometry:<14} {f'{speed.batch} x {speed.tokens}':>14}  {speed.kind:<9}"
    if speed.timing is None:
        return f"{case} {speed.note}"
    rates = f"{speed.timing.p50_ms:9.3f} {speed.gb_per_s:6.0f} {speed.copy_share:8.0%} {speed.tflops:7.0f}"
    return f"{case} {rates} {_peer(speed.matmul_ms, speed.matmul_ratio)} {_peer(speed.sdpa_ms, speed.sdpa_ratio)}"


def _peer(spent: float | None, ratio: float | None) -> str:
    return f"{'-':>18}" if spent is None else f"{spent:10.3f} {ratio:6.2f}x"


def list_line(speed: ListSpeed) -> str:
    """Return the line of a measurement of a whole step."""
    case = f"{speed.geometry:<14} {f'{speed.batch} x {speed.tokens}':>14}  {speed.kind:<19}"
    if speed.timing is None:
        return f"{case} {speed.note}"
    rates = f"{speed.timing.p50_ms:9.3f} {speed.gb_per_s:6.0f} {speed.copy_share:8.0%}"
    return f"{case} {rates} {_peer(speed.sdpa_ms, speed.sdpa_ratio)} {_peer(speed.dynamic_ms, speed.dynamic_ratio)}"


def page_line(speed: PageSpeed) -> str:
    """Return the line of a measurement of another operation."""
    case = f"{speed.operation:<13} {speed.kind:<5} {speed.case:<36}"
    if speed.timing is None:
        return f"{case} {speed.note}"
    return f"{case} {speed.timing.p50_ms:9.3f} {speed.gb_per_s:6.0f} {speed.copy_share:8.0%}"


def target_line(judged: dict[str, Any]) -> str:
    """Return the line of a target."""
    met = {True: "met", False: "missed", None: "not measured"}[judged["met"]]
    worst = judged["worst"]
    figure = (
        "" if worst is None else f"; worst: {next(v for k, v in worst.items() if k != 'case'):.2f}, {worst['case']}"
    )
    return f"{met:<12} {judged['target']}: {judged['least']:g}{figure}"


def sweep_line(row: SweepRow) -> str:
    """Return the line of a sweep."""
    case = f"sweep {row.geometry:<14} {f'{row.batch} x {row.tokens}':>14}  {row.kind:<5}"
    if row.gain is None or row.best is None:
        return f"{case} {row.note or 'nothing ran'}"
    best = ", ".join(f"{name} {value}" for name, value in row.best.items()) or "the default"
    return f"{case} default {row.default_ms:.3f} ms, best {row.best_ms:.3f} ms ({row.gain:.2f}x): {best}"
