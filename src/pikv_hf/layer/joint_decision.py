"""What the layers of a cache tell whatever decides for all of them what they keep."""

from typing import Any, Protocol

from ..allocation.observed_queries import ObservedCall


class JointDecision(Protocol):
    """Decides for the layers of a cache; :class:`~pikv_hf.layer.joint_budget.JointBudget` is one."""

    def begins(self, member: Any, new: int, waits_already: bool) -> bool:
        """Return whether `new` tokens that a layer is about to get are to wait for a decision."""

    def observe(self, member: Any, call: ObservedCall) -> None:
        """Note the queries and keys of a layer's newest tokens."""

    def ends(self, member: Any) -> None:
        """Decide, if tokens wait for it, once the last layer has attended."""

    def forked(self, layer: Any) -> None:
        """Have the fork of a layer decide for itself, until it is told of the others of its cache."""

    def make_room(self, member: Any) -> None:
        """Decide anew, before a layer gets a single token, if there is no room for as many as fit into a page."""

    def forget_call(self) -> None:
        """Forget the running call: its tokens, or some of them, are gone, or it will not go on."""
