"""The pages of a pool in a file: which tensors there are, writing them and reading them.

Tensors with pages have them along dimension 0, so that a page lies in one piece. Pages in use with few free ones among
them get their old numbers when they are loaded, so that attention adds up the same numbers in the same order; others
move together.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..kernels.page_codes import PageCodes
from ..pages.packed_pool import PackedPool
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..pages.types import PageIds
from ..tiers.code_bounds import CodeBounds
from .tensor_file import Section, Spec
from .tensor_writer import Group

# So many pages are written, or read, at a time.
CHUNK_PAGES = 128
# So many free pages, and a sixteenth of those in use, come back with a pool; of more it is freed.
SPARE_PAGES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class PagedTensor:
    """A tensor or array of a pool with an entry per page.

    Attributes
    ----------
    data : torch.Tensor
        As the pool has it; an array as a tensor that shares its memory.
    dim : int
        The dimension of the pages.
    """

    data: torch.Tensor
    dim: int

    @classmethod
    def of_array(cls, array: np.ndarray) -> "PagedTensor":
        """Return an array `(N, ...)` of the host."""
        return cls(torch.from_numpy(array), 0)

    def spec(self, pages: int) -> Spec:
        """Return what a file has of so many pages."""
        shape = list(self.data.shape)
        del shape[self.dim]
        return Spec(self.data.dtype, (pages, *shape))

    def pick(self, index: torch.Tensor) -> torch.Tensor:
        """Return the entries at `index` `(n,)`, with the pages along dimension 0."""
        index = index.to(self.data.device)
        return self.data.index_select(self.dim, index).movedim(self.dim, 0)

    def put(self, index: torch.Tensor, entries: torch.Tensor) -> None:
        """Set the entries at `index` `(n,)` to those of a file."""
        device = self.data.device
        self.data.index_copy_(self.dim, index.to(device), entries.to(device).movedim(0, self.dim))


Records = dict[str, PagedTensor]

# The tensors of a pool, by their names in a file


def token_records(pool: PagePool) -> Records:
    """Return the keys and values of a pool."""
    if isinstance(pool, PackedPool):
        return {**_code_records("keys", pool.keys), **_code_records("values", pool.values)}
    assert isinstance(pool, PlainPool)
    return {"keys": PagedTensor(pool.keys, 1), "values": PagedTensor(pool.values, 1)}


def _code_records(what: str, codes: PageCodes) -> Records:
    parts = {
        "codes": codes.codes,
        "spread": codes.spread,
        "floor": codes.floor,
        "outliers": codes.outliers,
        "fine": codes.fine,
        "latent": codes.latent,
    }
    return {f"{what}.{name}": PagedTensor(part, 1) for name, part in parts.items() if part is not None}


def note_records(pool: PagePool) -> Records:
    """Return the positions, counts and the like of each page; not what follows from the rest, as references do."""
    notes = {
        "positions": PagedTensor(pool.positions, 0),
        "count": PagedTensor.of_array(pool.count),
        "shard": PagedTensor.of_array(pool.shard),
    }
    if isinstance(pool, PlainPool):
        notes["experts"] = PagedTensor(pool.experts, 0)
        notes["incompressible"] = PagedTensor.of_array(pool.incompressible)
    elif isinstance(pool, PackedPool):
        notes["errors"] = PagedTensor.of_array(pool.errors)
    return notes


def bounds_records(pool: PagePool) -> Records:
    """Return the bounds of the keys of each page, where they are kept and do not follow from their codes."""
    bounds = None if isinstance(pool.bounds, CodeBounds) else pool.bounds
    records: Records = {}
    for name, kept in (("bounds", bounds), ("rotary_bounds", pool.rotary_bounds)):
        if kept is not None:
            records[f"{name}.ends"] = PagedTensor(kept.ends, 1)
            records[f"{name}.known"] = PagedTensor.of_array(kept.known)
    return records


def usage_records(pool: PagePool) -> Records:
    """Return the attention that each page took, where that is counted."""
    if pool.usage is None:
        return {}
    return {"usage.shares": PagedTensor(pool.usage.shares, 1), "usage.steps": PagedTensor(pool.usage.steps, 1)}


def page_notes(pool: PagePool) -> Records:
    """Return everything that is known of a pool's pages but their keys and values."""
    return {**note_records(pool), **bounds_records(pool), **usage_records(pool)}


# Writing


def most_pages(pages: int) -> int:
    """Return the most pages that a loaded pool may have of which so many are in use."""
    return pages + pages // 16 + SPARE_PAGES


def _numbers(pool: PagePool, used: PageIds) -> tuple[PageIds, int]:
    """Return the numbers `(n,)` that pages in use get when they are loaded, and the pages that the pool then has."""
    together = np.arange(len(used))
    if pool.capacity <= most_pages(len(used)) and (isinstance(pool, PlainPool) or np.array_equal(used, together)):
        return used, pool.capacity
    return together, len(used)


def describe_pool(prefix: str, pool: PagePool, ids: PageIds) -> tuple[dict[str, Any], Group]:
    """Return the description of the pages `ids` `(n,)` of a pool, but for its name and codecs, and their tensors."""
    parts = {**token_records(pool), **page_notes(pool)}
    specs = {f"{prefix}.{name}": part.spec(len(ids)) for name, part in parts.items()}
    specs[f"{prefix}.numbers"] = Spec(torch.int64, (len(ids),))
    new, capacity = _numbers(pool, ids)
    numbers = torch.from_numpy(new)

    def pieces() -> Iterator[list[torch.Tensor]]:
        for start in range(0, len(ids), CHUNK_PAGES):
            index = pool.index(ids[start : start + CHUNK_PAGES])
            notes = [part.pick(index) for part in page_notes(pool).values()]
            yield [*_tokens(pool, index), *notes, numbers[start : start + CHUNK_PAGES]]

    description = {
        "pages": len(ids),
        "capacity": capacity,
        "has_bounds": bool(bounds_records(pool)),
        "usage_step": None if pool.usage is None else pool.usage.now,
    }
    return description, Group(specs, pieces)


def _tokens(pool: PagePool, index: torch.Tensor) -> list[torch.Tensor]:
    """Return the keys and values of the pages at `index` `(n,)`, in whatever tier, the pages along dimension 0."""
    if not isinstance(pool, PackedPool):
        return [part.pick(index) for part in token_records(pool).values()]
    keys, values = pool.codes_at(index)
    records = {**_code_records("keys", keys), **_code_records("values", values)}
    return [part.data.movedim(part.dim, 0) for part in records.values()]


# Reading


def pool_specs(pool: PagePool, prefix: str, saved: dict[str, Any]) -> dict[str, Spec]:
    """Return the tensors that a file must have for the pages of a pool, of which `pool` has none yet."""
    _keep_bounds_and_usage(pool, saved)
    parts = {**token_records(pool), **note_records(pool), **usage_records(pool)}
    parts |= bounds_records(pool) if saved["has_bounds"] else {}
    specs = {f"{prefix}.{name}": part.spec(saved["pages"]) for name, part in parts.items()}
    return {**specs, f"{prefix}.numbers": Spec(torch.int64, (saved["pages"],))}


def fill_pool(pool: PagePool, saved: dict[str, Any], section: Section) -> None:
    """Copy the pages of a pool from a section of a file into a new one; nobody holds them yet."""
    numbers = section["numbers"]
    pool.reserve(saved["capacity"])
    if isinstance(pool, PlainPool):
        pool.allocate(saved["capacity"])
    for start in range(0, saved["pages"], CHUNK_PAGES):
        part = slice(start, start + CHUNK_PAGES)
        tokens = {name: section[name][part] for name in token_records(pool)}
        if isinstance(pool, PackedPool):
            ids = pool.allocate(len(numbers[part]))
            assert (ids == numbers[part].numpy()).all(), "a new pool gives its pages in order"
            # Before the pages are written: tiers have a file for each shard.
            pool.shard[ids] = section["shard"][part].numpy()
            codes = [tensor.movedim(0, 1).to(pool.device) for tensor in tokens.values()]
            split = len(pool.keys.tensors())
            pool.put(ids, codes[:split], codes[split:], section["errors"][part].numpy())
        else:
            for name, record in token_records(pool).items():
                record.put(numbers[part], tokens[name])
    for name, note in note_records(pool).items():
        note.put(numbers, section[name])
    pool.allocator.refcount[:] = 0


def restore_bounds_and_usage(pool: PagePool, saved: dict[str, Any], section: Section) -> None:
    """Restore the bounds and the counters of use of the pages of a filled pool."""
    _keep_bounds_and_usage(pool, saved)
    records = usage_records(pool) if saved["usage_step"] is not None else {}
    records |= bounds_records(pool) if saved["has_bounds"] else {}
    for name, record in records.items():
        record.put(section["numbers"], section[name])
    if saved["usage_step"] is not None:
        assert pool.usage is not None
        pool.usage.now = saved["usage_step"]


def _keep_bounds_and_usage(pool: PagePool, saved: dict[str, Any]) -> None:
    """Have a place for bounds and for counters of use where the saved pool had one."""
    if saved["usage_step"] is not None:
        pool.keep_usage(saved["usage_step"])
    if saved["has_bounds"]:
        pool.keep_bounds()
