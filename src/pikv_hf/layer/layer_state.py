"""The plain state of a layer: what a fork copies and a saved cache writes beside the pages."""

import dataclasses

import numpy as np


@dataclasses.dataclass(slots=True)
class LayerState:
    """Everything that a layer knows of its tokens but the tokens themselves.

    Attributes
    ----------
    seen : int
        Columns of the layer: positions that it has seen, evicted ones and padding included, or tokens assigned.
    dropped : int
        Positions that the model has seen beyond them, since fewer tokens were assigned than there were.
    assigned : int
        Columns of the last assignment: to which of the model's positions they belong is not known.
    evicted : bool
        Whether some columns hold no token although they are not padding.
    is_initialized : bool
        Whether pools and page tables exist.
    padding : numpy.ndarray or None
        `(B, n)` bool, True for columns that were padding when they came and were not stored, up to the last one; None
        if there are none.
    expert_loads : numpy.ndarray or None
        `(E,)` int64, tokens of each expert in the first prompt, by which balanced placement groups experts.
    reference_out : bool
        Whether the key tensor last returned carries a reference to the layer that no attention call has picked up yet.
    history_out : bool
        Whether that reference stood for tokens stored earlier.
    reference_lost : bool
        Whether the reference of a prompt got lost on its way to attention (JetMoE repeats the keys), where the new K/V
        alone are right: the layer returns dense K/V, until a reference reaches attention again.
    """

    seen: int = 0
    dropped: int = 0
    assigned: int = 0
    evicted: bool = False
    is_initialized: bool = False
    padding: np.ndarray | None = None
    expert_loads: np.ndarray | None = None
    reference_out: bool = False
    history_out: bool = False
    reference_lost: bool = False

    @property
    def positions_seen(self) -> int:
        """Positions that the model has seen, padding included."""
        return self.seen + self.dropped

    def copy(self) -> "LayerState":
        """Return an independent copy; its tensors, which are replaced and never written into, are the same."""
        return dataclasses.replace(self)

    def become(self, other: "LayerState") -> None:
        """Take over what a copy of earlier says. It stays the same object: whoever has it in hand goes on with it."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))
