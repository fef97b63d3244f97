"""How attention reads the pages of either kind of pool."""

import dataclasses

import torch

from .kernels import partial_attention
from .kernels.coded_attention import coded_attention
from .kernels.page_codes import PageCodes
from .page_book import PageBook
from .pages import PagePool
from .sealed_pool import SealedPool

# (out, lse) of attention over a part of the keys.
Partial = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class PlainReader:
    """Reads pages that keep their tokens as they came.

    Attributes
    ----------
    pool : PagePool
        Where the pages are.
    """

    pool: PagePool

    def codes(self) -> tuple[PageCodes, PageCodes]:
        """Return keys and values in the format that kernels read."""
        size = self.pool.page_size
        return PageCodes("none", size, self.pool.keys), PageCodes("none", size, self.pool.values)

    def query(self, queries: torch.Tensor) -> torch.Tensor:
        """Return queries `(H, ..., D)` as the stored keys expect them."""
        return queries

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """Return outputs `(H, ..., D')` over stored values in the model's own channels `(H, ..., Dv)`."""
        return out

    def attend_run(
        self,
        query: torch.Tensor,
        start: int,
        stop: int,
        scale: float,
        bias: torch.Tensor | None,
        holes: torch.Tensor | None,
        softcap: float | None,
    ) -> Partial:
        """Attend to pages `start..stop-1` in place; the rest as in :func:`partial_attention`, `(H, M, D)` queries."""
        slots = slice(start * self.pool.page_size, stop * self.pool.page_size)
        keys, values = self.pool.flat_keys[:, slots], self.pool.flat_values[:, slots]
        return partial_attention(query, keys, values, scale, bias, holes, softcap)

    def attend_gathered(
        self,
        query: torch.Tensor,
        table: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        holes: torch.Tensor | None,
        softcap: float | None,
    ) -> Partial:
        """Attend to the pages of a table `(B, n)`, copied; queries are `(H * B, M, D)`."""
        keys, values = (part.flatten(0, 1) for part in self.pool.gather(table))
        return partial_attention(query, keys, values, scale, bias, holes, softcap)


@dataclasses.dataclass(frozen=True, slots=True)
class SealedReader:
    """Reads packed pages without unpacking more than a block at a time. See :class:`PlainReader`."""

    pool: SealedPool

    def codes(self) -> tuple[PageCodes, PageCodes]:
        """Return keys and values in the format that kernels read."""
        return self.pool.keys, self.pool.values

    def query(self, queries: torch.Tensor) -> torch.Tensor:
        """Return queries `(H, ..., D)` in the keys' code space."""
        return self.pool.key_codec.to_code_space(queries)

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """Return outputs in the values' code space in the model's own channels."""
        return self.pool.value_codec.from_code_space(out)

    def attend_run(
        self,
        query: torch.Tensor,
        start: int,
        stop: int,
        scale: float,
        bias: torch.Tensor | None,
        holes: torch.Tensor | None,
        softcap: float | None,
    ) -> Partial:
        """Attend to pages `start..stop-1` in place."""
        keys, values = self.pool.keys.narrow(start, stop), self.pool.values.narrow(start, stop)
        return coded_attention(query, keys, values, scale, bias, holes, softcap)

    def attend_gathered(
        self,
        query: torch.Tensor,
        table: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        holes: torch.Tensor | None,
        softcap: float | None,
    ) -> Partial:
        """Attend to the pages of a table `(B, n)`, their codes copied; queries are `(H * B, M, D')`."""
        index = table.reshape(-1)

        def lanes(part: torch.Tensor) -> torch.Tensor:
            return part.unflatten(1, table.shape).flatten(0, 1)

        keys, values = self.pool.keys.pick(index).map(lanes), self.pool.values.pick(index).map(lanes)
        return coded_attention(query, keys, values, scale, bias, holes, softcap)


def reader_of(pool: PageBook) -> PlainReader | SealedReader:
    """Return the reader of a pool."""
    if isinstance(pool, PagePool):
        return PlainReader(pool)
    assert isinstance(pool, SealedPool)
    return SealedReader(pool)
