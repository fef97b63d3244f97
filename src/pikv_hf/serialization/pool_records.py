"""The pages of a pool as a file holds them.

Tensors with pages have them along dimension 0, so that a page lies in one piece. Pages in use with few free ones among
them get their old numbers when they are loaded, so that attention adds up the same numbers in the same order; others
move together.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..pages.key_bounds import KeyBounds
from ..pages.packed_pool import PackedPool
from ..pages.page_pool import PagePool
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import PLAIN, PoolId
from ..pages.types import PageIds
from ..pages.usage_counters import UsageCounters
from .tensor_file import Group, Spec, TensorFile

#: Arrays with an entry per page that follow from others: who holds it, and whether it ever held tokens.
_DERIVED = ("refcount", "used")
#: What files call an array whose name has changed since.
_FILE_NAMES = {"incompressible": "kept"}
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


def companions(pool: PagePool) -> dict[str, KeyBounds | UsageCounters]:
    """Return what routing and scheduling know of a pool's pages, by attribute of the pool."""
    known = {"bounds": pool.bounds, "usage": pool.usage}
    return {name: companion for name, companion in known.items() if companion is not None}


def token_tensors(pool: PagePool) -> dict[str, PagedTensor]:
    """Return the keys and values of a pool, by number."""
    return {f"tokens.{number}": PagedTensor(tensor, 1) for number, tensor in enumerate(pool.token_tensors())}


def _tokens(pool: PagePool, index: torch.Tensor) -> list[torch.Tensor]:
    """Return the keys and values of the pages at `index` `(n,)`, in whatever tier, with these along dimension 0."""
    if not isinstance(pool, PackedPool):
        return [part.pick(index) for part in token_tensors(pool).values()]
    keys, values = pool.codes_at(index)
    return [part.movedim(1, 0) for part in (*keys.tensors(), *values.tensors())]


def page_notes(pool: PagePool) -> dict[str, PagedTensor]:
    """Return everything else that is known of a pool's pages and that does not follow from the rest."""
    notes = _own_notes(pool)
    for name, companion in companions(pool).items():
        notes |= _companion_notes(name, companion)
    return notes


def _own_notes(pool: PagePool) -> dict[str, PagedTensor]:
    kind = PlainPool if isinstance(pool, PlainPool) else PackedPool
    notes = {"positions": PagedTensor(pool.positions, 0), "experts": PagedTensor(pool.experts, 0)}
    # Asked of these classes themselves: where a subclass has its pages lie is nothing to be written down.
    for name in kind.new_page:
        if name not in _DERIVED:
            notes[_FILE_NAMES.get(name, name)] = PagedTensor(torch.from_numpy(getattr(pool, name)), 0)
    return notes


def _companion_notes(name: str, companion: KeyBounds | UsageCounters) -> dict[str, PagedTensor]:
    """Return a companion's tensors, which have the pages along dimension 1, and arrays, along dimension 0."""
    notes = {}
    for part, value in vars(companion).items():
        if isinstance(value, torch.Tensor):
            notes[f"{name}.{part}"] = PagedTensor(value, 1)
        elif isinstance(value, np.ndarray):
            notes[f"{name}.{part}"] = PagedTensor(torch.from_numpy(value), 0)
    return notes


def pool_prefix(prefix: str, pool: PoolId) -> str:
    """Return what the names of a pool's tensors in the file begin with."""
    return f"{prefix}.pages.{pool.name}"


def name_in_file(pool: PoolId) -> str:
    """Return what descriptions in a file call a pool."""
    return "" if pool == PLAIN else pool.name


def pool_of(description: dict[str, Any]) -> PoolId:
    """Return the pool that a file describes."""
    return PoolId.parse(description["name"]) if description["name"] else PLAIN


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
    """Describe the pages `ids` `(n,)` of a pool."""
    parts = {**token_tensors(pool), **page_notes(pool)}
    specs = {f"{prefix}.{name}": part.spec(len(ids)) for name, part in parts.items()}
    specs[f"{prefix}.numbers"] = Spec(torch.int64, (len(ids),))
    new, capacity = _numbers(pool, ids)
    numbers = torch.from_numpy(new)

    def pieces() -> Iterator[list[torch.Tensor]]:
        for start in range(0, len(ids), CHUNK_PAGES):
            index = pool.index(ids[start : start + CHUNK_PAGES])
            notes = [part.pick(index) for part in page_notes(pool).values()]
            yield [*_tokens(pool, index), *notes, numbers[start : start + CHUNK_PAGES]]

    beside = {
        name: {part: value for part, value in vars(companion).items() if isinstance(value, int | float)}
        for name, companion in companions(pool).items()
    }
    return {"pages": len(ids), "capacity": capacity, "companions": beside}, Group(specs, pieces)


def pool_specs(pool: PagePool, prefix: str, saved: dict[str, Any]) -> dict[str, Spec]:
    """Return the tensors that a file must have for the pages of a pool, of which `pool` has none yet."""
    _companions_as(pool, saved)
    parts = {**token_tensors(pool), **page_notes(pool)}
    specs = {f"{prefix}.{name}": part.spec(saved["pages"]) for name, part in parts.items()}
    return {**specs, f"{prefix}.numbers": Spec(torch.int64, (saved["pages"],))}


def fill_pool(pool: PagePool, prefix: str, saved: dict[str, Any], file: TensorFile) -> None:
    """Copy the pages of a pool from a file into a new one; nobody holds them yet."""
    numbers = file[f"{prefix}.numbers"]
    pool.reserve(saved["capacity"])
    if isinstance(pool, PlainPool):
        pool.allocate(saved["capacity"])
    for start in range(0, saved["pages"], CHUNK_PAGES):
        part = slice(start, start + CHUNK_PAGES)
        tokens = [file[f"{prefix}.{name}"][part] for name in token_tensors(pool)]
        if isinstance(pool, PackedPool):
            ids = pool.allocate(len(numbers[part]))
            assert (ids == numbers[part].numpy()).all(), "a new pool gives its pages in order"
            # Before the pages are written: tiers have a file for each shard.
            pool.shard[ids] = file[f"{prefix}.shard"][part].numpy()
            codes = [tensor.movedim(0, 1).to(pool.device) for tensor in tokens]
            split = len(pool.keys.tensors())
            pool.put(ids, codes[:split], codes[split:], file[f"{prefix}.errors"][part].numpy())
        else:
            for held, tensor in zip(token_tensors(pool).values(), tokens, strict=True):
                held.put(numbers[part], tensor)
    for name, note in _own_notes(pool).items():
        note.put(numbers, file[f"{prefix}.{name}"])
    pool.allocator.refcount[:] = 0


def restore_companions(pool: PagePool, prefix: str, saved: dict[str, Any], file: TensorFile) -> None:
    """Let routing and scheduling know of a filled pool what they knew when it was saved."""
    _companions_as(pool, saved)
    for name in saved["companions"]:
        for part, note in _companion_notes(name, companions(pool)[name]).items():
            note.put(file[f"{prefix}.numbers"], file[f"{prefix}.{part}"])
        for number, value in saved["companions"][name].items():
            setattr(companions(pool)[name], number, value)


def _companions_as(pool: PagePool, saved: dict[str, Any]) -> None:
    """Give a pool the companions that the saved one had."""
    if "usage" in saved["companions"]:
        pool.keep_usage(saved["companions"]["usage"]["now"])
    if "bounds" in saved["companions"]:
        pool.keep_bounds()
