"""Making a failing program small: fewer calls, simpler arguments, simpler caches."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from families import FAMILIES
from program_alphabet import ALPHABET
from program_draw import OPTIONS, Call, Program
from program_models import ATTENTION


def _simpler(program: Program) -> Iterator[Program]:
    """Yield programs that are a step simpler, the largest steps first."""
    calls = program.calls
    for size in (4, 2, 1):
        for start in range(len(calls) - size, -1, -1):
            yield dataclasses.replace(program, calls=calls[:start] + calls[start + size :])
    for name, value in (("devices", None), ("autocast", False), ("batch", 1), ("batch", 2)):
        if getattr(program, name) != value and not (name == "batch" and value > program.batch):
            yield dataclasses.replace(program, **{name: value})
    simplest = {"tiers": None, "hot_replicas": 0, **{name: choices[0] for name, choices in OPTIONS.items()}}
    for name, value in simplest.items():
        if program.options.get(name, value) != value:
            yield dataclasses.replace(program, options={**program.options, name: value})
    if program.options.get("placement", "hash") != "hash":
        yield dataclasses.replace(program, options={**program.options, "placement": "hash", "hot_replicas": 0})
    for index, call in enumerate(calls):
        for argument, choices in ALPHABET[call.name].choices.items():
            for choice in _before(choices, call.arguments[argument]):
                changed = Call(call.name, {**call.arguments, argument: choice})
                yield dataclasses.replace(program, calls=(*calls[:index], changed, *calls[index + 1 :]))
    yield from _other_families(program)


def _before(choices: tuple[Any, ...], choice: Any) -> list[Any]:
    unlike = list(dict.fromkeys(choices))
    return unlike[: unlike.index(choice)]


def _other_families(program: Program) -> Iterator[Program]:
    routed = FAMILIES[program.family].routed
    for family in ("olmoe", "llama"):
        if family == program.family:
            return
        if FAMILIES[family].routed == routed or program.options.get("placement", "hash") == "hash":
            yield dataclasses.replace(program, family=family, attention="sdpa")
    if program.attention != "sdpa" and program.family not in ATTENTION:
        yield dataclasses.replace(program, attention="sdpa")


def shrunk(program: Program, fails: Callable[[Program], bool], attempts: int = 400) -> Program:
    """Return a program that fails as the given one does, and no simpler one of which does within the attempts."""
    left = attempts
    progress = True
    while progress and left > 0:
        progress = False
        for candidate in _simpler(program):
            left -= 1
            if fails(candidate):
                program, progress = candidate, True
                break
            if left <= 0:
                break
    return program
