"""Budgets that layers share hold whatever happens to the cache, and calls that end early leave nothing behind."""

import pytest
from hypothesis import HealthCheck, given, settings
from joint_programs import Program, Run, programs


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs())
def test_random_programs_keep_to_the_budget(program: Program) -> None:
    Run(program).run()


@pytest.mark.parametrize("share", [48, 90])
@pytest.mark.parametrize(("rows", "prompt"), [(3, 150), (2, 100)])
def test_rows_are_cropped_where_layers_evict_of_one_another(rows: int, prompt: int, share: int) -> None:
    """Several rows begin several pages, for which another layer has to let go of some."""
    for budget in range(90, 250, 6):
        options = {"budget": f"{budget}KB", "recent_window": 0, "placement": "hash"}
        Run(Program(options, rows, prompt, padded=False, steps=(("crop", share),), looks=False)).run()


@pytest.mark.parametrize("routing", ["page_mass", "page_bound"])
def test_what_routing_keeps_of_pages_is_within_the_budget(routing: str) -> None:
    for budget in range(110, 250, 10):
        options = {"budget": f"{budget}KB", "routing": routing, "max_pages": 3}
        Run(Program(options, 1, 200, padded=False, steps=(("decode", 9),))).run()


@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_budget_holds_can_be_forked_and_saved(rows: int) -> None:
    """Pages of single heads take more than those of all of them, and the budget was begun with these."""
    for budget in range(56, 150, 4):
        options = {"budget": f"{budget}KB", "page_size": 4, "placement": "hash"}
        Run(Program(options, rows, 200, padded=False, steps=(("decode", 12), ("fork", 1), ("save", 1)))).run()
