"""Compaction: what is kept of a layer's tokens is copied into new pools, each token in the width chosen for it.

A table whose rows hold all KV heads becomes one whose rows are *lanes*, one (sequence, KV head) each, as soon as heads
keep different tokens; the pages of a lane have one head. Pages that a codec has packed are packed again only in fewer
bits: what is evicted or narrowed leaves its page, and the page goes with its last token.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ..codecs.codec import is_lowrank
from ..config import PiKVConfig
from ..kernels.page_codes import PageCodes, reordered
from ..pages.packed_pool import PackedPool
from ..pages.page_contents import PageContents
from ..pages.plain_pool import PlainPool
from ..pages.pool_id import PoolId
from ..pages.types import PageIds
from ..tiers.tier_limits import LayerTiers
from ..tiers.tiered_pool import TieredPool
from .layer_pools import LayerPools, retire
from .page_packing import PackedPages, adopt_pages, pack_pages
from .sequence_pages import SequencePages

#: The codec of each width in bits of K and V.
WIDTHS = {2: "int2", 4: "int4", 8: "int8", 16: "none"}

#: Stands for a token that is kept in the codecs of the configuration.
AS_CONFIGURED = 1


@dataclasses.dataclass(frozen=True, slots=True)
class ExactTokens:
    """Tokens as the model made them, by column of the sequence.

    Attributes
    ----------
    keys, values : torch.Tensor
        `(B, H, T, D)` and `(B, H, T, Dv)`.
    stored : torch.Tensor
        `(B, H, T)` bool, which of them are there.
    """

    keys: torch.Tensor
    values: torch.Tensor
    stored: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class CodedPages:
    """Packed pages of one pool, by row of the table that they are taken from.

    Attributes
    ----------
    pool : PackedPool
        Where they are.
    rows : list of numpy.ndarray
        For each row of the old table, its pages there.
    bits : int
        Of its codes; see :func:`bits_of`.
    """

    pool: PackedPool
    rows: Sequence[PageIds]
    bits: int = 0


def bits_of(pool_id: PoolId) -> int:
    """Return the width of a pool's codes, the fewer of keys and values; 0 for codecs that have none."""
    known = {codec: bits for bits, codec in WIDTHS.items()}
    return min(known.get(codec or "", 0) for codec in pool_id)


def is_narrower(widths: torch.Tensor, bits: int) -> torch.Tensor:
    """Return where widths ask for fewer bits than there are: such tokens are packed again."""
    return (widths > AS_CONFIGURED) & (widths < bits)


def config_of_lanes(config: PiKVConfig) -> PiKVConfig:
    """Return the configuration for pages of single KV heads: the same, without low-rank codecs.

    A low-rank basis belongs to a head, and pages of lanes are of any head: what comes is kept as it is.
    """
    codecs = ["none" if is_lowrank(codec) else codec for codec in (config.key_codec, config.value_codec)]
    return dataclasses.replace(config, key_codec=codecs[0], value_codec=codecs[1])


class Compaction:
    """New pools and sequences for what is kept of a layer's tokens; the old ones stay as they are.

    Parameters
    ----------
    widths : torch.Tensor
        `(B, H, T)` uint8: 0 evicts a token, 2, 4, 8 or 16 are bits, :data:`AS_CONFIGURED` leaves it to the codecs.
    leaders : list of int
        For each of the B rows the first row with the same tokens, kept alike.
    exact : ExactTokens
        What is not packed yet.
    config : PiKVConfig
        Page size and codecs.
    split : bool
        Whether rows become lanes of one head.
    tiers : LayerTiers, optional
        Where full pages may go.
    """

    def __init__(
        self,
        widths: torch.Tensor,
        leaders: list[int],
        exact: ExactTokens,
        config: PiKVConfig,
        split: bool,
        tiers: LayerTiers | None = None,
    ) -> None:
        self.leaders = leaders
        self.batch, self.heads, self.columns = widths.shape
        self.split = split
        self.page_heads = 1 if split else self.heads
        self._widths, self._exact = widths, exact
        self._leading = list(dict.fromkeys(leaders))
        if split:
            config = config_of_lanes(config)
        keys, values = exact.keys, exact.values
        dims = keys.shape[-1], values.shape[-1]
        pool = PlainPool(self.page_heads, *dims, config.page_size, keys.dtype, keys.device)
        self.pools = LayerPools(pool, config, tiers)
        lanes = self.heads if split else 1
        self._sequences = {
            (row, lane): SequencePages.empty(config.num_shards) for row in self._leading for lane in range(lanes)
        }
        self._num_shards = config.num_shards

    @property
    def rows(self) -> list[SequencePages]:
        """The rows of the new table."""
        lanes = range(self.heads if self.split else 1)
        return [self._sequences[leader, lane] for leader in self.leaders for lane in lanes]

    @contextmanager
    def retired_on_error(self) -> Iterator[None]:
        """Delete the pages of the new pools from slower tiers if the block raises."""
        try:
            yield
        except BaseException:
            retire(self.pools.packed.values())
            raise

    # Tokens that no codec has packed

    def add_exact(self) -> None:
        """Store the exact tokens that are kept, a page at a time, lane by lane and width by width."""
        wanted = self._widths.where(self._exact.stored, 0)
        wanted = self._of_leaders(wanted)
        for width in torch.unique(wanted).tolist():
            if width:
                self._add_width(wanted == width, width)

    def _of_leaders(self, per_head: torch.Tensor) -> torch.Tensor:
        """Turn `(B, H, T)` into `(lanes, T)`: the rows, or the heads of the rows, that lead."""
        leading = per_head[self._leading]
        return leading.flatten(0, 1) if self.split else leading[:, 0]

    def _add_width(self, kept: torch.Tensor, width: int) -> None:
        """Store the exact tokens `(lanes, T)` that are kept in one width."""
        pages, counts, owners = self._exact_pages(kept)
        if width != AS_CONFIGURED:
            self._give(pack_pages(self.pools, pages, WIDTHS[width]), counts, owners)
            return
        left = np.ones(len(counts), dtype=np.bool_)
        if self.pools.encoders.is_ready(len(counts) * self.pools.plain.page_size):
            packed = pack_pages(self.pools, pages)
            self._give(packed, counts, owners)
            for which, _ in packed.values():
                left[which] = False
        if left.any():
            rest = pages if left.all() else pages.pick(np.flatnonzero(left))
            self._give(pack_pages(self.pools, rest, "none"), counts[left], owners[left])

    def _exact_pages(self, kept: torch.Tensor) -> tuple[PageContents, np.ndarray, np.ndarray]:
        """Return the kept exact tokens `(lanes, T)` in n pages, the tokens in each, `(n,)`, and its lane, `(n,)`."""
        size = self.pools.plain.page_size
        columns, counts, lanes = paged_columns(kept, size)
        keys, values = (self._pages(part, columns, lanes) for part in (self._exact.keys, self._exact.values))
        inside = torch.arange(size, device=columns.device) < counts[:, None]
        positions = columns.where(inside, -1).to(torch.int32)
        shards = np.arange(len(columns)) % self._num_shards
        pages = PageContents(keys, values, positions, positions[:, :0].to(torch.int16), shards)
        return pages, counts.cpu().numpy(), lanes.cpu().numpy()

    def _pages(self, tokens: torch.Tensor, columns: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
        """Return pages `(page_heads, n, P, D)` of the tokens `(B, H, T, D)` in these columns `(n, P)`."""
        leading = torch.tensor(self._leading, device=tokens.device)
        if self.split:
            first = (leading[lanes // self.heads] * self.heads + lanes % self.heads)[None]
        else:
            first = leading[lanes] * self.heads + torch.arange(self.heads, device=tokens.device)[:, None]
        index = first[:, :, None] * tokens.shape[2] + columns
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, index.view(-1)).view(*index.shape, -1)

    def _give(self, packed: PackedPages, counts: np.ndarray, owners: np.ndarray) -> None:
        """Hand packed pages, `counts` `(n,)` tokens in each, to the lanes `owners` `(n,)` that they belong to."""
        lanes = list(self._sequences)
        for pool_id, (which, ids) in packed.items():
            self.pools.packed[pool_id].count[ids] = counts[which]
            for owner in np.unique(owners[which]):
                self.pools.add_packed(self._sequences[lanes[owner]], pool_id, ids[owners[which] == owner])

    # Pages that a codec has packed

    def add_coded(self, coded: CodedPages, was_split: bool) -> None:
        """Take over packed pages without what is evicted from them."""
        pool = coded.pool
        pages, heads, owners = self._pages_of_leaders(coded, was_split)
        positions = pool.positions[pool.index(pages)]
        lanes = pool.index(owners)[:, None]
        staying = (self._widths > 0) & ~is_narrower(self._widths, coded.bits)
        kept = self._of_leaders(staying)[lanes, positions.clamp_min(0).long()] & (positions >= 0)
        counts = kept.sum(dim=1).cpu().numpy()
        stays = np.flatnonzero(counts)
        step = pool.chunk_pages() if isinstance(pool, TieredPool) else max(1, len(stays))
        for block in np.split(stays, range(step, len(stays), step)) if len(stays) else []:
            index = pool.index(block)
            order = torch.argsort(~kept[index], dim=1, stable=True)
            keys, values = _copied_codes(pool, pages[block], heads[block], self.page_heads)
            if (counts[block] < pool.count[pages[block]]).any():
                keys, values = reordered(keys, order), reordered(values, order)
            target, ids = adopt_pages(self.pools, pool, pages[block], keys, values)
            target.positions[target.index(ids)] = positions[index].where(kept[index], -1).gather(1, order)
            self._give({target.id: (np.arange(len(block)), ids)}, counts[block], owners[block])

    def _pages_of_leaders(self, coded: CodedPages, was_split: bool) -> tuple[PageIds, np.ndarray, np.ndarray]:
        """Return the packed pages `(n,)` of the rows that lead; for each the KV head, and the new lane, it is for."""
        lanes_each = self.heads if self.split else 1
        pages, heads, owners = [], [], []
        for lane, (row, head) in enumerate(self._sequences):
            ids = coded.rows[row * lanes_each + head] if was_split else coded.rows[row]
            pages.append(ids)
            heads.append(np.full(len(ids), head))
            owners.append(np.full(len(ids), lane))
        return np.concatenate(pages), np.concatenate(heads), np.concatenate(owners)


def _copied_codes(pool: PackedPool, ids: PageIds, heads: np.ndarray, page_heads: int) -> tuple[PageCodes, PageCodes]:
    """Return copies of pages `(n,)`, of those heads `(n,)` of them alone if pages of one head are wanted."""
    if isinstance(pool, TieredPool):
        keys, values = pool.codes_at(pool.index(ids))
        index, pages = pool.index(np.arange(len(ids))), len(ids)
    else:
        keys, values, index, pages = pool.keys, pool.values, pool.index(ids), pool.capacity
    if keys.heads != page_heads:
        index = pool.index(heads) * pages + index
    picked = [_lanes_of(codes, page_heads).pick(index) for codes in (keys, values)]
    return picked[0], picked[1]


def _lanes_of(codes: PageCodes, heads: int) -> PageCodes:
    """View pages `(H, N, ...)` as pages of one head `(1, H * N, ...)`, or leave them."""
    return codes if codes.heads == heads else codes.map(lambda part: part.reshape(1, -1, *part.shape[2:]))


def paged_columns(kept: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Divide the kept tokens of lanes into pages, in order of their columns.

    Parameters
    ----------
    kept : torch.Tensor
        `(L, T)` bool.
    page_size : int
        P.

    Returns
    -------
    tuple of torch.Tensor
        `(n, P)` int64 columns, a page's last token repeated where it is not full; `(n,)` tokens in each page; `(n,)`
        the lane of each.
    """
    columns = kept.nonzero()[:, 1]
    tokens = kept.sum(dim=1)
    pages = (tokens + page_size - 1) // page_size
    owner = torch.repeat_interleave(torch.arange(len(kept), device=kept.device), pages)
    first_page, first_token = pages.cumsum(0) - pages, tokens.cumsum(0) - tokens
    within = torch.arange(len(owner), device=kept.device) - first_page[owner]
    counts = (tokens[owner] - within * page_size).clamp(max=page_size)
    start = first_token[owner] + within * page_size
    tokens_of_page = torch.minimum(torch.arange(page_size, device=kept.device), counts[:, None] - 1)
    return columns[start[:, None] + tokens_of_page], counts, owner
