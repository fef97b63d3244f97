"""The free list and the reference counts of a pool, against lists of who holds which page."""

import numpy as np
import pytest

from pikv_hf.pages.page_allocator import PageAllocator


class Holders:
    """Sequences that allocate, share, copy and release pages as a cache's do."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.allocator = PageAllocator()
        self.sequences: list[list[int]] = []

    def step(self) -> None:
        """Do one of these things at random."""
        what = self.random.choice(["allocate", "share", "copy", "release"], p=[0.4, 0.25, 0.15, 0.2])
        if what == "allocate" or not self.sequences:
            self.allocate(int(self.random.integers(1, 6)))
            return
        which = int(self.random.integers(len(self.sequences)))
        pages = self.sequences[which]
        if what == "share":
            self.allocator.incref(np.array(pages))
            self.sequences.append(list(pages))
        elif what == "release":
            del self.sequences[which]
            left = {page for sequence in self.sequences for page in sequence}
            assert set(self.allocator.decref(np.array(pages)).tolist()) == set(pages) - left
        elif self.allocator.refcount[pages[-1]] > 1:
            copy = self.taken(1)[0]
            self.allocator.hand_over(pages[-1], copy, holders=1)
            pages[-1] = copy

    def allocate(self, pages: int) -> None:
        after = self.sequences[-1][-1] if self.sequences else -1
        self.sequences.append(self.taken(pages, after))

    def taken(self, pages: int, after: int = -1) -> list[int]:
        if (short := pages - self.allocator.free_pages) > 0:
            self.allocator.resize(self.allocator.capacity + short)
        free = self.allocator.free_mask()
        ids = self.allocator.allocate(pages, after)
        assert free[ids].all()
        assert len(set(ids.tolist())) == pages
        return ids.tolist()

    def check(self) -> None:
        held = [page for sequence in self.sequences for page in sequence]
        expected = np.bincount(held, minlength=self.allocator.capacity) if held else np.zeros(self.allocator.capacity)
        assert (self.allocator.refcount == expected).all()


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_those_of_the_holders(seed: int) -> None:
    holders = Holders(seed)
    for _ in range(150):
        holders.step()
        holders.check()


@pytest.mark.parametrize("seed", range(8))
def test_a_failed_transaction_changes_nothing(seed: int) -> None:
    """What was held when it began is not given to anybody meanwhile, however often it is released."""
    holders = Holders(seed)
    for _ in range(30):
        holders.step()
    before = [list(sequence) for sequence in holders.sequences]
    held = {page for sequence in before for page in sequence}

    def fail() -> None:
        with holders.allocator.transaction():
            for sequence in before:
                holders.allocator.decref(np.array(sequence))
            assert not held & set(holders.taken(10))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    holders.sequences = before
    holders.check()
    assert not holders.allocator.spares_pages


def test_kept_pages_come_first() -> None:
    allocator = PageAllocator()
    allocator.resize(6)
    ids = allocator.allocate(6)
    allocator.incref(ids[4:])
    allocator.decref(ids[:2])
    given = allocator.allocations
    allocator.resize(5, ids[2:])
    assert allocator.refcount.tolist() == [1, 1, 2, 2, 0]
    assert allocator.allocations == given + 1, "plans that read past free pages are to be made anew"
