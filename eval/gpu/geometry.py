"""List the attention layers and sizes that are measured, and count their bytes."""

import dataclasses
from collections.abc import Iterator

import torch

from pikv_hf.eval.gpu.arena import pages_bytes
from pikv_hf.eval.gpu.copy_speed import PAGE_SIZE
from pikv_hf.eval.gpu.references import PageTable
from pikv_hf.kernels.page_codes import Kind


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Attention of a model: its name, query heads, KV heads, channels of keys and of values."""

    name: str
    query_heads: int
    kv_heads: int
    dim: int
    value_dim: int


#: DeepSeek-V3 as transformers stores it: every head's keys and values, not the latent they come from.
GEOMETRIES = (
    Geometry("Qwen3-30B-A3B", 32, 4, 128, 128),
    Geometry("Mixtral-8x7B", 32, 8, 128, 128),
    Geometry("gpt-oss", 64, 8, 64, 64),
    Geometry("DeepSeek-V3", 128, 128, 192, 128),
)

#: Tokens and rows, the ones with a target first.
SIZES = (
    (32768, 8),
    (131072, 8),
    (32768, 32),
    (131072, 32),
    (8192, 8),
    (8192, 32),
    (8192, 1),
    (32768, 1),
    (131072, 1),
)

#: Kinds measured with every geometry, and those with the first one too.
MAIN_KINDS: tuple[Kind, ...] = ("none", "int8", "int4")
MORE_KINDS: tuple[Kind, ...] = ("int2", "fp8")


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """B rows that each decode one token after T cached ones, T a multiple of the page size."""

    geometry: Geometry
    tokens: int
    batch: int

    @property
    def columns(self) -> int:
        """Return n, the pages of a row."""
        return self.tokens // PAGE_SIZE

    @property
    def dense_bytes(self) -> int:
        """Return the bytes of the keys and values in bf16."""
        geometry = self.geometry
        return 2 * self.batch * geometry.kv_heads * self.tokens * (geometry.dim + geometry.value_dim)

    def packed_bytes(self, kind: Kind) -> int:
        """Return the bytes of the pages of keys and values, all tensors of them."""
        geometry, pages = self.geometry, self.batch * self.columns
        return sum(
            pages_bytes(kind, geometry.kv_heads, pages, PAGE_SIZE, dim, keys=keys)
            for dim, keys in ((geometry.dim, True), (geometry.value_dim, False))
        )

    def read_bytes(self, kind: Kind) -> int:
        """Return the bytes that attention has to read: the pages, table, counts and lengths."""
        pages = self.batch * self.columns
        # Numbers of 4 bytes: the table, the counts, the lengths.
        return self.packed_bytes(kind) + 4 * (pages + pages + self.batch)


def scattered_table(batch: int, columns: int, device: torch.device) -> PageTable:
    """Return full rows whose pages lie in a pool of just these in random order."""
    pages = batch * columns
    return PageTable(
        torch.randperm(pages, device=device).view(batch, columns).int(),
        torch.full((batch,), columns, dtype=torch.int32, device=device),
        torch.full((pages,), PAGE_SIZE, dtype=torch.int32, device=device),
    )


def table_bytes(page_table: PageTable) -> int:
    """Return the bytes of the table, the lengths and the counts."""
    return page_table.entries.nbytes + page_table.lengths.nbytes + page_table.counts.nbytes


def attention_cases(*, quick: bool = False) -> Iterator[tuple[Shape, Kind]]:
    """Yield what to measure, by importance."""
    for tokens, batch in SIZES[:1] if quick else SIZES:
        for geometry in GEOMETRIES[:1] if quick else GEOMETRIES:
            more = MORE_KINDS if geometry is GEOMETRIES[0] and not quick else ()
            for kind in MAIN_KINDS + more:
                yield Shape(geometry, tokens, batch), kind
