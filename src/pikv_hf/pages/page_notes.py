"""What routing and scheduling know of the pages of a pool beside their tokens; it follows whatever happens to them."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from ..common.kv import KV
from ..kernels.page_codes import PageCodes
from .key_bounds import KeyBounds, read_bounds
from .key_codes import KeyCodes
from .types import PageIds
from .usage_counters import UsageCounters


class PageNotes(ABC):
    """Notes on the pages of a pool, none of which are kept before somebody asks for them.

    Attributes
    ----------
    rotary_values : bool
        Whether values are the rotary parts of the keys, as in latent attention: notes are then of both, side by side.
    bounds, rotary_bounds : KeyBounds, optional
        The least and largest keys of each page, for routing, and those of rotary parts alone where codes tell the rest.
    codes : KeyCodes, optional
        The keys of each page in 2 bits, for routing that scores tokens.
    usage : UsageCounters, optional
        The attention that each page took, for scheduling; see :meth:`keep_usage`.
    """

    noted: ClassVar[tuple[str, ...]] = ("bounds", "rotary_bounds", "codes", "usage")
    page_size: int
    device: torch.device
    positions: torch.Tensor

    def __init__(self) -> None:
        self.rotary_values = False
        self.bounds: KeyBounds | None = None
        self.rotary_bounds: KeyBounds | None = None
        self.codes: KeyCodes | None = None
        self.usage: UsageCounters | None = None

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Pages, free ones included."""

    @property
    @abstractmethod
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page."""

    @property
    @abstractmethod
    def key_shape(self) -> tuple[int, int]:
        """Heads and channels of the keys, rotary parts included."""

    @abstractmethod
    def index(self, ids: npt.NDArray[np.integer]) -> torch.Tensor:
        """Return host integers as an int64 tensor on the pool's device."""

    @abstractmethod
    def decoded(self, index: torch.Tensor, which: KV) -> torch.Tensor:
        """Return the keys, or the values, of the pages at `index` `(n,)` in the model's dtype, `(H, n * P, D)`."""

    @abstractmethod
    def _new_bounds(self) -> KeyBounds | None:
        """Return the bounds of no pages; None where the stored keys tell them."""

    @property
    def key_parts(self) -> tuple[KV, ...]:
        """What the channels of the keys are stored as."""
        return (KV.KEYS, KV.VALUES) if self.rotary_values else (KV.KEYS,)

    def _kept_beside(self) -> list[KeyBounds | KeyCodes | UsageCounters]:
        return [each for name in self.noted if (each := getattr(self, name)) is not None]

    def keep_usage(self, now: int) -> None:
        """Count the attention that pages take from step `now` on."""
        if self.usage is None:
            every = np.arange(self.capacity)
            usage = UsageCounters(self.device).resized(self.capacity, every[:0], 0)
            usage.now = now
            usage.reset(every)
            self.usage = usage

    def keep_bounds(self) -> None:
        """Have a place for the bounds of all pages from now on, so that their bytes count."""
        if self.bounds is None and (bounds := self._new_bounds()) is not None:
            self.bounds = bounds.resized(self.capacity, np.arange(0), 0)

    def keep_codes(self) -> None:
        """Have a place for the 2-bit codes of the keys of all pages from now on, so that their bytes count."""
        if self.codes is None:
            heads, dim = self.key_shape
            codes = KeyCodes(heads, self.page_size, dim, self.device, self.key_parts)
            self.codes = codes.resized(self.capacity, np.arange(0), 0)

    def key_bounds(self, ids: PageIds) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bounds of the keys of all pages, known at least for those at `ids`.

        Returns
        -------
        tuple of torch.Tensor
            `(H, N, D)` least values, and `(H, N, D)` largest ones or codes of the spreads above the least, as
            :func:`pikv_hf.kernels.page_scores.page_scores` takes them.
        """
        self.keep_bounds()
        assert self.bounds is not None
        self.bounds.find(self, ids, self._read_bounds)
        return self.bounds.low, self.bounds.high

    def _read_bounds(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bounds of the keys of pages `(n,)`; see :func:`read_bounds`."""
        assert self.bounds is not None
        return read_bounds(self, index, self.bounds.parts)

    def key_codes(self, ids: PageIds) -> PageCodes:
        """Return the 2-bit codes of the keys of all pages, made at least for those at `ids`."""
        self.keep_codes()
        assert self.codes is not None
        return self.codes.find(self, ids)

    def _forget_keys(self, ids: PageIds) -> None:
        """Forget what is known of the keys of pages `(n,)` that other tokens may come to."""
        for found in (self.bounds, self.rotary_bounds, self.codes):
            if found is not None:
                found.reset(ids)
