"""Name what the kernels are meant to reach on an NVIDIA H200, and judge whether they did."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from pikv_hf.eval.gpu.attention_speed import AttentionSpeed
from pikv_hf.kernels.page_codes import Kind

#: The GPU the targets are for, and the cases they are about: at least so many tokens and rows.
TARGET_GPU, TARGET_TOKENS, TARGET_BATCH = "NVIDIA H200", 32768, 8


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A least value of a figure of `paged_decode_attention` on pages of a kind."""

    name: str
    kind: Kind
    figure: Literal["copy_share", "sdpa_ratio"]
    least: float


TARGETS = (
    Target("bf16 pages: share of the copy bandwidth", "none", "copy_share", 0.85),
    Target("int8 pages: share of the copy bandwidth", "int8", "copy_share", 0.80),
    Target("int4 pages: share of the copy bandwidth", "int4", "copy_share", 0.70),
    Target("int4 pages: times as fast as dense bf16 attention", "int4", "sdpa_ratio", 3.0),
)


def judged(target: Target, speeds: Iterable[AttentionSpeed]) -> dict[str, Any]:
    """Return a target, its worst and best case, and whether every case that could be measured meets it.

    `met` is None where none could be. Cases without time or memory are only named; one that failed misses the target.
    """
    cases = [s for s in speeds if s.kind == target.kind and s.tokens >= TARGET_TOKENS and s.batch >= TARGET_BATCH]
    figures = {_case_name(case): getattr(case, target.figure) for case in cases}
    found = {name: figure for name, figure in figures.items() if figure is not None}
    failed = {_case_name(case) for case in cases if case.failed}
    missed = {name for name, figure in found.items() if figure < target.least} | failed
    worst, best = (pick(found, key=found.__getitem__, default=None) for pick in (min, max))
    return {
        "target": target.name,
        "for": f"{TARGET_GPU}, from {TARGET_TOKENS} tokens and {TARGET_BATCH} rows",
        "least": target.least,
        "met": not missed if found or failed else None,
        "worst": None if worst is None else {"case": worst, target.figure: found[worst]},
        "best": None if best is None else {"case": best, target.figure: found[best]},
        "missed_by": sorted(missed),
        "without_figure": sorted(figures.keys() - found.keys()),
    }


def _case_name(case: AttentionSpeed) -> str:
    return f"{case.geometry}, {case.batch} x {case.tokens} tokens"
