"""What a scheduling policy is, and the names that policies are known by."""

from abc import ABC, abstractmethod
from typing import ClassVar

from ...common.registry import Registry
from ...config import SCHEDULERS
from .page_stats import Floats, PageStats


class SchedulingPolicy(ABC):
    """Says which pages go first.

    Attributes
    ----------
    name : str
        What :func:`~pikv_hf.scheduling.policies.registry.make_policy` knows it by.
    per_head : bool
        Whether every KV head should have pages of its own, so that heads may keep different pages.
    wants_bounds : bool
        Whether it reads :attr:`PageStats.bounds`; see :attr:`reads_bounds`.
    """

    name: ClassVar[str]
    per_head: ClassVar[bool] = False
    wants_bounds: ClassVar[bool] = False

    @property
    def reads_bounds(self) -> bool:
        """Whether it reads :attr:`PageStats.bounds` with the options that it has."""
        return self.wants_bounds

    @abstractmethod
    def priority(self, view: PageStats) -> Floats:
        """Return `(n,)` float64, finite or +inf; the page with the lowest goes first, of equal ones the oldest."""

    def count_reads(self, hits: int, misses: int) -> None:  # noqa: B027 (most policies do not care)
        """Learn how many of the pages asked for were in fast memory, and how many were not."""


#: The policies by name, each a dataclass of its options, registered where it is defined.
POLICIES: Registry[SchedulingPolicy] = Registry("scheduler", SCHEDULERS)


def check_range(policy: SchedulingPolicy, option: str, low: float, high: float) -> None:
    """Raise a ValueError unless the value of an option is in [`low`, `high`]."""
    value = getattr(policy, option)
    if not low <= value <= high:
        raise ValueError(f"{option} of scheduler {policy.name!r} must be in [{low:g}, {high:g}], got {value}")
