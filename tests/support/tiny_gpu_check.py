"""The GPU check at sizes that Triton's interpreter and torch on the processor are quick with."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pikv_hf.eval.gpu import (
    check_attention,
)
from pikv_hf.eval.gpu.arena import Arena
from pikv_hf.eval.gpu.check_attention import AttentionCase
from pikv_hf.eval.gpu.checks import Check, Outcome, PlannedCheck, Platform, run_checks
from pikv_hf.eval.gpu.copy_speed import Bench
from pikv_hf.eval.gpu.geometry import Geometry
from pikv_hf.eval.gpu.time_limit import TimeLimit
from pikv_hf.eval.gpu.timing import Timing

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ON_GPU = torch.cuda.is_available()
#: The kernels themselves: compiled where there is a GPU, else run by Triton's interpreter.
PLATFORM = Platform(torch.device("cuda" if ON_GPU else "cpu"), "triton" if ON_GPU else "interpret")
TORCH = Platform(CPU, "torch")
TINY = Geometry("tiny", 4, 2, 16, 24)
#: Expanded, rank and rotary channels of latent attention.
TINY_LATENTS = Geometry("tiny", 3, 3, 24, 16), 32, 16


def forever() -> TimeLimit:
    return TimeLimit(1.0, clock=lambda: 0.0)


def tiny_case(**changes: Any) -> AttentionCase:
    return dataclasses.replace(
        AttentionCase("int4", "int4", torch.float32, dim=16, value_dim=32, group=2, batch=4, columns=4, page_size=8),
        **changes,
    )


KERNEL = check_attention.paged_decode_attention


def in_single(query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Attend in float32, whatever the query's dtype: torch's own bf16 rounds logits, which the kernels do not."""
    return KERNEL(query.float(), *args, **kwargs)


def checked(plans: list[PlannedCheck], platform: Platform) -> list[Check]:
    results = list(run_checks(plans, platform, forever()))
    assert all(isinstance(result, Check) for result in results)
    return [result for result in results if isinstance(result, Check)]


def once(call: Callable[[], Any], most: int = 1) -> Timing:
    """Time a call on the processor, once however often it is asked for."""
    started = time.perf_counter()
    call()
    return Timing.of([1000 * (time.perf_counter() - started)])


def bench(size: int = 1 << 22) -> Bench:
    return Bench(CPU, "torch", Arena(size, CPU), once, copy_gb_per_s=10.0)


# Verdicts.


def outcome(result: list[float], exact: list[float], yardstick: list[float], **options: float) -> Outcome:
    parts = (torch.tensor(numbers, dtype=torch.float64) for numbers in (result, exact, yardstick))
    return Outcome("out", *parts, **options)


def plan_of(result: list[float], operation: str = "gather_pages", kind: str = "int8") -> PlannedCheck:
    return PlannedCheck(operation, "case", torch.bfloat16, kind, lambda platform: [outcome(result, [1.0], [1.0])])


# TimeLimit.


class FakeClock:
    """A clock that advances by one second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now
