"""Budgets that layers share hold whatever happens to the cache, and calls that end early leave nothing behind."""

from hypothesis import HealthCheck, given, settings
from joint_programs import Program, Run, programs


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_random_programs_keep_to_the_budget(program: Program) -> None:
    Run(program).run()


def test_rows_are_cropped_where_layers_evict_of_one_another() -> None:
    """Several rows begin several pages, for which another layer has to let go of some."""
    options = {"budget": "120KB", "recent_window": 0, "placement": "hash"}
    Run(Program(options, rows=3, prompt=150, padded=False, steps=(("crop", 48),))).run()
