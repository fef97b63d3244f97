"""Random programs of public calls: DynamicCache's logits and tokens, or a refusal that changes nothing."""

import random
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from program_alphabet import ALPHABET
from program_draw import NAMES, Call, Program, draw_program
from program_run import run
from program_script import script
from program_shrink import shrunk

from pikv_hf import PiKVCache

pytestmark = [
    pytest.mark.filterwarnings("ignore:A PiKVCache stores tokens detached"),
    pytest.mark.filterwarnings("ignore:.* changes keys between the cache and attention"),
]
PROGRAMS = st.composite(lambda draw: draw_program(lambda choices: draw(st.sampled_from(choices))))()


def smallest(program: Program, kind: str) -> str:
    """Return the smallest program that fails alike, as a script."""
    small = shrunk(program, lambda other: run(other).kind == kind)
    report = run(small)
    return script(small, report.texts, f"{report.failure}")


# One part is enough in development; `make fuzz` runs many more.
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_programs_do_what_they_do_with_dynamic_cache(part: int) -> None:
    @seed(part)
    @settings(max_examples=40)
    @given(PROGRAMS)
    def check(program: Program) -> None:
        report = run(program)
        if report.failure is not None:
            pytest.fail(smallest(program, report.kind), pytrace=False)

    check()


def test_most_programs_run_to_their_end() -> None:
    """A generator of refusals would test nothing."""
    reports = [run(draw_program(random.Random(number).choice)) for number in range(40)]
    assert sum(report.ends == "same" and not report.refused for report in reports) >= 32
    assert sum(report.calls for report in reports) >= 120


def test_every_call_is_drawn() -> None:
    drawn = [draw_program(random.Random(number).choice) for number in range(400)]
    assert {call.name for program in drawn for call in program.calls} == set(NAMES)


def test_a_wrong_result_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop that does nothing: the call that matters and one before it are left."""
    monkeypatch.setattr(PiKVCache, "crop", lambda cache, length: None)
    programs = (draw_program(random.Random(number).choice) for number in range(200))
    program, report = next(
        (program, report) for program in programs if (report := run(program)).kind.startswith("crop:")
    )
    small = shrunk(program, lambda other: run(other).kind == report.kind)
    assert len(small.calls) == 2
    text = script(small, run(small).texts, "")
    assert "cache.crop(" in text or "crop_to(cache" in text
    compile(text, "script", "exec")


def test_a_refusal_that_changes_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cache: PiKVCache, length: int) -> None:
        cache.reset()
        raise ValueError("tier 'cpu' may hold 10 bytes")

    monkeypatch.setattr(PiKVCache, "crop", refuse)
    arguments: dict[str, Any] = {name: choices[0] for name, choices in ALPHABET["forward"].choices.items()}
    calls = (Call("forward", arguments), Call("crop", {"by": 1, "sign": "negative"}))
    report = run(Program("olmoe", "sdpa", True, None, {}, 2, False, calls))
    assert report.kind.startswith("crop: after a refusal")
