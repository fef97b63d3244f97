"""Make presses by class name, this project's and kvpress's: `PiKVPress`, `AdaKVPress(SnapKVPress(window_size=32))`."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pikv_hf.presses
from pikv_hf.common.extras import install_command
from pikv_hf.common.suggest import did_you_mean
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.calls import Call, parse_call
from pikv_hf.presses.press_base import KVPRESS, BasePress
from pikv_hf.presses.press_budget import PressBudget

#: What `--ratio` sets, by order of preference; the first one that a press has.
_RATIOS = ("compression_ratio", "key_channel_compression_ratio", "head_compression_ratio")


@dataclass(frozen=True, slots=True)
class PressFactory:
    """Makes a fresh press for every sample, so that no state of one reaches another.

    Attributes
    ----------
    spec : str
        As the user wrote it.
    ratio : float
        Share of the cache to remove, in [0, 1); 0 if the press has no such option.
    make : callable
        Returns a new press.
    """

    spec: str
    ratio: float
    make: Callable[[], Any]

    @property
    def label(self) -> str:
        """Name and ratio for tables and plots."""
        return f"{self.spec.replace('Press', '')} {100 * self.ratio:.4g}%"


def press_classes() -> dict[str, type]:
    """Return all presses by class name: this project's and, where it is, those kvpress exports but its base classes."""
    packages = (pikv_hf.presses,) if KVPRESS is None else (pikv_hf.presses, KVPRESS)
    members = [(name, getattr(package, name)) for package in packages for name in package.__all__]
    return {
        name: member
        for name, member in members
        if inspect.isclass(member) and issubclass(member, BasePress) and name not in ("BasePress", "ScorerPress")
    }


def press_factory(spec: str, ratio: float | None = None) -> PressFactory:
    """Prepare a press by name.

    Parameters
    ----------
    spec : str
        A class name, with options in parentheses where wanted; a press around others takes them as arguments:
        `AdaKVPress(SnapKVPress)`, `ComposedPress([SnapKVPress, ThinKPress(window_size=16)])`.
    ratio : float, optional
        Share of the cache to remove, in [0, 1). Set on the press itself, or through it on the one it is around. The
        presses of a `ComposedPress` share it: each keeps the same part of what the one before it left.

    Raises
    ------
    InputError
        For an unknown class (with a suggestion), unknown options, a ratio out of range, or one that the press needs
        but is not given.
    """
    call = parse_call(spec)
    if ratio is not None and not 0 <= ratio < 1:
        raise InputError(f"--ratio must be at least 0 and below 1, got {ratio}")

    def make() -> Any:
        press = _build(call)
        _set_ratio(press, ratio, spec)
        return press

    # Made once here, so that a mistake shows before a model is loaded.
    return PressFactory(spec, _ratio(make()), make)


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return [_build(element) for element in value]
    if not isinstance(value, Call):
        return value
    known = press_classes()
    if value.name not in known:
        more = f"; those of kvpress need it: {install_command('kvpress')}" if KVPRESS is None else ""
        hint = did_you_mean(value.name, known)
        raise InputError(f"unknown press {value.name!r}{hint} (known: {', '.join(known)}{more})")
    cls = known[value.name]
    options = [field.name for field in dataclasses.fields(cls) if field.init]
    for name in value.options:
        if name not in options:
            raise InputError(
                f"{value.name} has no option {name!r}{did_you_mean(name, options)} (known: {', '.join(options)})"
            )
    arguments = [_build(argument) for argument in value.arguments]
    try:
        return cls(*arguments, **{name: _build(option) for name, option in value.options.items()})
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"cannot make {value.name}: {error}") from error


def _set_ratio(press: Any, ratio: float | None, spec: str) -> None:
    holders = _ratio_holders(press)
    if ratio is None:
        if holders and not _ratio(press) and not getattr(press, "removes", False):
            raise InputError(f"{spec} needs --ratio, the share of the cache to remove, or it would remove nothing")
        return
    if not holders:
        raise InputError(f"{spec} has no compression ratio for --ratio {ratio}; give its own options in parentheses")
    each = ratio if len(holders) == 1 else 1 - (1 - ratio) ** (1 / len(holders))
    for holder, name in holders:
        if getattr(holder, "budget", None) is not None:
            raise InputError(f"{spec} has a budget, {holder.budget!r}, and cannot take --ratio {ratio} as well")
        setattr(holder, name, each)


def _ratio_holders(press: Any) -> list[tuple[Any, str]]:
    """Return the presses whose ratio `--ratio` sets, and what it is called there."""
    if KVPRESS is not None and isinstance(press, KVPRESS.ComposedPress):
        # Its ratio is the product of theirs; channels are counted apart from tokens.
        return [(inner, "compression_ratio") for inner in press.presses if _settable(inner, "compression_ratio")]
    name = next((name for name in _RATIOS if _settable(press, name)), None)
    return [] if name is None else [(press, name)]


def _settable(press: Any, name: str) -> bool:
    """Return whether a press has an attribute that can be set; some only tell what came out of the last prompt."""
    try:
        setattr(press, name, getattr(press, name))
    except (AttributeError, AssertionError, ValueError, TypeError):
        return False
    return True


def _ratio(press: Any) -> float:
    """Return what the press removes by its own account, 0 if it cannot say."""
    kept = math.prod(1 - _own_ratio(holder, name) for holder, name in _ratio_holders(press))
    # Rounded, since shares of a ratio make it up again only nearly.
    return round(1 - kept, 12)


def _own_ratio(holder: Any, name: str) -> float:
    budget = getattr(holder, "budget", None)
    if budget is None:
        return float(getattr(holder, name) or 0.0)
    given = PressBudget.parse(budget)
    return 1 - given.amount if given.kind == "share" else 0.0
