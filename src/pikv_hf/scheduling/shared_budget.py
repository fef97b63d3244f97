"""A budget that the layers of a cache share: what one of them may hold depends on what the others do."""

from typing import Protocol

import torch

from ..page_table.page_table import PageTable
from ..pages.plain_pool import PlainPool


class BudgetUser(Protocol):
    """A layer's scheduler, which keeps some bytes beside the pages.

    Attributes
    ----------
    jointly : bool
        Whether all layers of the cache are to decide together what each keeps.
    """

    jointly: bool

    @property
    def shared(self) -> "SharedBudget | None":
        """What the layer shares its budget by, None if it has one of its own."""

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors that hold memory."""

    def most_beside(self, pool: PlainPool, rows: int) -> int:
        """Return the most bytes that these may take for a table of so many rows."""


class SharedBudget(Protocol):
    """The layers of a cache; :class:`~pikv_hf.layer.joint_budget.JointBudget` is one.

    Attributes
    ----------
    deciding : bool
        Whether it is being decided what all of them keep: until then none has to keep to anything.
    """

    deciding: bool

    def room_beside(self, user: BudgetUser) -> int:
        """Return by how many bytes the pools of all layers but a user's own are below their parts of a budget."""

    def over(self, user: BudgetUser, table: PageTable, row: int) -> int:
        """Return the bytes that a sequence holds too many, where a user's layer is to hold this table."""

    def evict_elsewhere(self, user: BudgetUser, row: int, nbytes: int) -> int:
        """Evict pages of a sequence, or of all if it is below 0, in other layers; return how many bytes are missing."""
