"""The page pool and how pages are read: growth, reuse, rollback, runs and the free pages between them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf import PiKVConfig
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.page_table.read_plan import make_plan
from pikv_hf.pages.plain_pool import PlainPool
from pikv_hf.pages.tokens import TokenBatch


def pool() -> PlainPool:
    return PlainPool(num_heads=2, key_dim=4, value_dim=3, page_size=4, dtype=torch.float32, device=torch.device("cpu"))


def test_pages_lie_side_by_side_where_possible() -> None:
    pages = pool()
    first = pages.allocate(10)
    assert first.tolist() == list(range(10))
    pages.decref(first[[2, 4, 5, 6]])
    assert pages.allocate(3).tolist() == [4, 5, 6]
    assert pages.allocate(1, after=1).tolist() == [2]
    pages.decref(np.array([0, 3, 8]))
    scattered = pages.allocate(3)
    assert scattered.tolist() in ([0, 3, 8], [10, 11, 12])


def test_growth_keeps_content_and_is_geometric() -> None:
    pages = pool()
    ids = pages.allocate(64)
    slots = pages.index(np.arange(256))
    pages.write(slots, TokenBatch(torch.randn(2, 256, 4), torch.randn(2, 256, 3), slots.int(), slots.to(torch.int16)))
    before = [tensor.clone() for tensor in pages.tensors()]
    sizes = set()
    for _ in range(40):
        pages.allocate(1)
        sizes.add(pages.capacity)
    assert len(sizes) <= 9, "the pool grew page by page"
    assert pages.capacity <= 104 * 1.1
    for tensor, old, dim in zip(pages.tensors(), before, (1, 1, 0, 0), strict=True):
        assert torch.equal(tensor.narrow(dim, 0, len(ids)), old)


def test_reused_pages_start_clean() -> None:
    pages = pool()
    ids = pages.allocate(2)
    slots = pages.index(np.arange(8))
    nan = torch.full((2, 8, 4), torch.nan)
    pages.write(slots, TokenBatch(nan, nan[..., :3], slots.int(), slots.to(torch.int16)))
    pages.count[ids] = 4
    pages.decref(ids)
    assert pages.count.tolist() == [0, 0]
    again = pages.allocate(2)
    assert again.tolist() == [0, 1]
    assert (pages.positions == -1).all()
    assert (pages.experts == -1).all()
    assert torch.isfinite(pages.values).all()


def test_failed_transaction_changes_no_count() -> None:
    pages = pool()
    ids = pages.allocate(3)
    before = pages.allocator.refcount.copy(), pages.count.copy()

    def fail() -> None:
        with pages.transaction():
            pages.decref(ids[:1])
            pages.allocate(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (pages.allocator.refcount[:3] == before[0]).all()
    assert pages.allocator.refcount[3:].sum() == 0
    assert (pages.count[:3] == before[1]).all()


@given(
    owners=st.lists(st.sampled_from(["free", "a", "b", "ab", "other"]), min_size=1, max_size=60).map(
        lambda picks: [p for p in picks for _ in range(4)]
    ),
    min_run=st.sampled_from([2, 8, 20]),
)
def test_plan_covers_every_page_once(owners: list[str], min_run: int) -> None:
    """Every row reads each of its pages exactly once, and nothing else but clean free pages."""
    held = [np.array([i for i, owner in enumerate(owners) if name in owner and owner != "other"]) for name in "ab"]
    held = [ids.astype(np.int64) for ids in held]
    free = np.array([owner == "free" for owner in owners])
    counts = np.where(free, 0, 4)
    plan = make_plan(held, [[0, 2], [1]], free, counts, size=4, min_run=min_run)
    read: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for run in plan.runs:
        assert run.stop - run.start >= min_run
        for row in run.rows:
            read[row] += [page for page in range(run.start, run.stop) if not free[page]]
        inside = [page for page in range(run.start, run.stop) if free[page]]
        assert set(inside) <= set(plan.bridged.tolist()) & set(run.partial.tolist())
    for row in read:
        read[row] += plan.scattered[row, : plan.lengths[row]].tolist()
    assert sorted(read[0]) == sorted(read[2]) == held[0].tolist()
    assert sorted(read[1]) == held[1].tolist()
    assert free[plan.bridged].all()


def layer() -> PiKVLayer:
    return PiKVLayer(0, PiKVConfig(page_size=4, recent_window=8, num_shards=3, placement="hash"))


def test_a_row_of_nan_stays_alone() -> None:
    """Neither neighbours in the batch nor later owners of its pages read a broken row's K/V."""
    cache = layer()
    query = torch.randn(2, 4, 1, 16)
    for tokens in [30, 30, 30] + [1] * 40:
        keys, values = torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)
        keys[0], values[0] = torch.nan, torch.nan
        cache.update(keys, values)
        out, _ = attend(cache, query)
        assert torch.isfinite(out[1]).all()
        assert not torch.isfinite(out[0]).any()
    cache.batch_select_indices(torch.tensor([1, 1]))
    for _ in range(100):
        cache.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
        assert torch.isfinite(attend(cache, query)[0]).all()


def test_forks_may_take_the_free_pages_that_a_run_reads_past() -> None:
    cache = layer()
    cache.update(torch.randn(1, 2, 160, 16), torch.randn(1, 2, 160, 16))
    cache.settle()
    table, pool_ = cache.table, cache.table.plain
    query = torch.randn(1, 4, 1, 16)
    expected, _ = attend(cache, query)
    # Leave a gap in the middle by moving a page: what flushing a window page does sooner or later.
    middle = int(table.rows[0].full[len(table.rows[0].full) // 2])
    moved = pool_.copy_page(middle)
    table.rows[0].full[table.rows[0].full == middle] = moved
    pool_.decref(np.array([middle]))
    table._changed()
    assert middle in table.view.plan().bridged
    torch.testing.assert_close(attend(cache, query)[0], expected)
    # Someone else takes the page and fills it with what must not be read.
    taken = pool_.allocate(pool_.allocator.free_pages)
    assert middle in taken
    pool_.values[:, taken], pool_.keys[:, taken] = torch.nan, torch.nan
    pool_.count[taken] = 4
    torch.testing.assert_close(attend(cache, query)[0], expected)
