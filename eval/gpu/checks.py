"""Run planned checks of kernels one by one, and judge them by the error that the kernel's dtype itself brings."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch

from pikv_hf.eval.gpu.time_limit import TimeLimit

#: Added to the bound, as a share of the largest exact magnitude (at least 1 for a log-sum-exp): 64 units in the last
#: place of float32, for exp2 and division that are faster than torch's, and for another order of sums.
FLOOR = 64 * 2.0**-24


@dataclasses.dataclass(frozen=True, slots=True)
class Platform:
    """Where kernels run: the device, and the backend that is forced on them."""

    device: torch.device
    backend: str


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """One result of a kernel beside the exact one and what torch makes of it in the same dtype.

    Attributes
    ----------
    name : str
        Which result.
    result, exact, yardstick : torch.Tensor
        Of one shape, on any device. Infinities have to be equal; NaN is an error wherever it is.
    unit : float
        Magnitude that the floor of the bound is a share of, where the exact result's own is smaller.
    factor, floor : float
        The error may be `factor` times the yardstick's, plus `floor` times the largest exact magnitude.
    """

    name: str
    result: torch.Tensor
    exact: torch.Tensor
    yardstick: torch.Tensor
    unit: float = 0.0
    factor: float = 2.0
    floor: float = FLOOR


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedCheck:
    """A check to run: of an operation, in a dtype, on pages of a kind (`"-"` where it reads none)."""

    operation: str
    case: str
    dtype: torch.dtype
    kind: str
    run: Callable[[Platform], Iterable[Outcome]]


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """What became of a check.

    Attributes
    ----------
    operation, name, dtype, kind : str
        What was checked; the name is that of the case and of the result.
    max_error, bound : float or None
        Largest absolute error against float64, and what was allowed; None where there is no finite one.
    ok : bool
        Whether the error is within the bound.
    note : str
        What the kernel raised, or why there is no figure.
    """

    operation: str
    name: str
    dtype: str
    kind: str
    max_error: float | None
    bound: float | None
    ok: bool
    note: str = ""


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def max_difference(result: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest absolute difference in float64: infinite if NaN, an unequal infinity or a shape says so."""
    if result.shape != exact.shape:
        return float("inf")
    ours, truth = result.to("cpu", torch.float64), exact.to("cpu", torch.float64)
    apart = torch.where(ours == truth, 0.0, (ours - truth).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(apart.max()) if apart.numel() else 0.0


def bound_of(outcome: Outcome) -> float:
    """Return the error allowed: by default twice that of torch in the same dtype, and a floor."""
    finite = outcome.exact[outcome.exact.isfinite()].abs()
    unit = max(outcome.unit, float(finite.max()) if finite.numel() else 0.0)
    return outcome.factor * max_difference(outcome.yardstick, outcome.exact) + outcome.floor * unit


def run_checks(
    plans: Iterable[PlannedCheck], platform: Platform, time_limit: TimeLimit
) -> Iterator[Check | PlannedCheck]:
    """Run checks in order; yield a :class:`Check` per result, and the plan itself where no time was left for it."""
    for plan in plans:
        if time_limit.is_spent():
            yield plan
        else:
            yield from _checked(plan, platform)


def _checked(plan: PlannedCheck, platform: Platform) -> list[Check]:
    try:
        return [_judged(plan, outcome) for outcome in plan.run(platform)]
    except Exception as error:  # Whatever a kernel raises, from its compiler's errors to the driver's, is a red check.
        return [_check(plan, plan.case, None, None, ok=False, note=reason(error))]


def _judged(plan: PlannedCheck, outcome: Outcome) -> Check:
    name = f"{plan.case}: {outcome.name}"
    error, bound = max_difference(outcome.result, outcome.exact), bound_of(outcome)
    if error == float("inf"):
        return _check(plan, name, None, bound, ok=False, note="NaN, a wrong infinity or a wrong shape")
    return _check(plan, name, error, bound, ok=error <= bound)


def _check(
    plan: PlannedCheck, name: str, error: float | None, bound: float | None, *, ok: bool, note: str = ""
) -> Check:
    return Check(plan.operation, name, dtype_name(plan.dtype), plan.kind, error, bound, ok, note)


def reason(error: Exception) -> str:
    """Return an exception's class and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def red_operations(checks: Iterable[Check]) -> set[tuple[str, str]]:
    """Return operation and kind of the failed checks."""
    return {(check.operation, check.kind) for check in checks if not check.ok}


def why_red(red: set[tuple[str, str]], operation: str, kind: str) -> str:
    """Return why an operation on a kind has no benchmark figure, empty if its checks are green.

    A check of mixed kinds, `"int8/int4"`, counts for both; one of no kind for all.
    """
    for checked, of in sorted(red):
        if checked == operation and ("-" in (kind, of) or kind in of.split("/")):
            return f"a check of {operation} on {of} pages is red" if of != "-" else f"a check of {operation} is red"
    return ""
