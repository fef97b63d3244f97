"""Classes that options name: every name of the configuration has one, and no other name can get one."""

from typing import ClassVar

import pytest

from pikv_hf.common.registry import Named, Registry
from pikv_hf.config import ROUTINGS, SCHEDULERS
from pikv_hf.routing.policies import POLICIES as ROUTING_POLICIES
from pikv_hf.scheduling.policies.registry import POLICIES as SCHEDULING_POLICIES


def test_every_name_has_a_policy() -> None:
    assert {"all", *ROUTING_POLICIES} == set(ROUTINGS)
    assert set(SCHEDULING_POLICIES) == set(SCHEDULERS)
    for known in (ROUTING_POLICIES, SCHEDULING_POLICIES):
        assert all(policy.name == name for name, policy in known.items())


def test_a_name_that_the_configuration_does_not_know_is_refused() -> None:
    registry: Registry[Named] = Registry("colour", ["red", "green"])

    @registry.register("red")
    class Red:
        name: ClassVar[str]

    assert registry == {"red": Red}
    assert Red.name == "red"
    with pytest.raises(ValueError, match="colour='blue' is none of 'red', 'green'"):
        registry.register("blue")
