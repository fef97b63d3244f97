"""Keeping some of a layer's tokens, each lane its own, in the width chosen for it, and freeing the rest.

A table whose rows hold all KV heads becomes one whose rows are *lanes*, one (sequence, KV head) each, as soon as heads
keep different tokens; the pages of a lane have one head. Pages that a codec has packed are never packed again: what is
evicted leaves its page, and the page goes with its last token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from .config import PiKVConfig
from .kernels.page_codes import PageCodes, reordered
from .page_book import PageIds
from .pages import FullPages, PagePool
from .sealed_pool import SealedPool
from .sequence import SequencePages
from .store import PageStore

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
    held : torch.Tensor
        `(B, H, T)` bool, which of them are there.
    """

    keys: torch.Tensor
    values: torch.Tensor
    held: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class CodedPages:
    """Pages of one pool that hold some of the tokens.

    Attributes
    ----------
    pool : SealedPool
        Where they are.
    rows : list of numpy.ndarray
        For each row of the old table, its pages there.
    """

    pool: SealedPool
    rows: Sequence[PageIds]


class KeptTokens:
    """A store of its own for what a layer keeps.

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
    """

    def __init__(
        self, widths: torch.Tensor, leaders: list[int], exact: ExactTokens, config: PiKVConfig, split: bool
    ) -> None:
        self.leaders = leaders
        self.batch, self.heads, self.columns = widths.shape
        self.split = split
        self.page_heads = 1 if split else self.heads
        self._widths, self._exact = widths, exact
        self._leading = list(dict.fromkeys(leaders))
        if split and "lowrank" in config.key_codec + config.value_codec:
            # A basis belongs to a head, and pages of lanes are of any head: what comes is kept as it is.
            codecs = ("none" if "lowrank" in codec else codec for codec in (config.key_codec, config.value_codec))
            config = dataclasses.replace(config, key_codec=next(codecs), value_codec=next(codecs))
        keys, values = exact.keys, exact.values
        dims = keys.shape[-1], values.shape[-1]
        pool = PagePool(self.page_heads, *dims, config.page_size, keys.dtype, keys.device)
        self.store = PageStore(pool, config)
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

    # Tokens that no codec has packed

    def add_exact(self) -> None:
        """Store the exact tokens that are kept, a page at a time, lane by lane and width by width."""
        wanted = self._widths.where(self._exact.held, 0)
        wanted = self._of_leaders(wanted)
        for width in torch.unique(wanted).tolist():
            if width:
                self._add_width(wanted == width, width)

    def _of_leaders(self, per_head: torch.Tensor) -> torch.Tensor:
        """Turn `(B, H, T)` into `(lanes, T)`: the rows, or the heads of the rows, that lead."""
        leading = per_head[self._leading]
        return leading.flatten(0, 1) if self.split else leading[:, 0]

    def _add_width(self, kept: torch.Tensor, width: int) -> None:
        size = self.store.plain.page_size
        columns, counts, lanes = paged_columns(kept, size)
        keys, values = (self._pages(part, columns, lanes) for part in (self._exact.keys, self._exact.values))
        inside = torch.arange(size, device=columns.device) < counts[:, None]
        positions = columns.where(inside, -1).to(torch.int32)
        shards = np.arange(len(columns)) % self._num_shards
        pages = FullPages(keys, values, positions, positions[:, :0].to(torch.int16), shards)
        numbers, owners = counts.cpu().numpy(), lanes.cpu().numpy()
        left = np.ones(len(columns), dtype=np.bool_)
        if width != AS_CONFIGURED:
            self._give(self.store.pack(pages, WIDTHS[width]), numbers, owners)
            return
        if self.store.is_ready(len(columns)):
            packed = self.store.pack(pages)
            self._give(packed, numbers, owners)
            for which, _ in packed.values():
                left[which] = False
        if left.any():
            rest = pages if left.all() else pages.pick(np.flatnonzero(left))
            self._give(self.store.pack(rest, "none"), numbers[left], owners[left])

    def _pages(self, tokens: torch.Tensor, columns: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
        """Return pages `(page_heads, n, P, D)` of the tokens `(B, H, T, D)` in these columns `(n, P)`."""
        leading = torch.tensor(self._leading, device=tokens.device)
        if self.split:
            first = (leading[lanes // self.heads] * self.heads + lanes % self.heads)[None]
        else:
            first = leading[lanes] * self.heads + torch.arange(self.heads, device=tokens.device)[:, None]
        index = first[:, :, None] * tokens.shape[2] + columns
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, index.view(-1)).view(*index.shape, -1)

    def _give(self, packed: dict[str, tuple[np.ndarray, PageIds]], counts: np.ndarray, owners: np.ndarray) -> None:
        """Hand packed pages, `counts` `(n,)` tokens in each, to the lanes `owners` `(n,)` that they belong to."""
        lanes = list(self._sequences)
        for name, (which, ids) in packed.items():
            self.store.sealed[name].count[ids] = counts[which]
            for owner in np.unique(owners[which]):
                self.store.give(self._sequences[lanes[owner]], name, ids[owners[which] == owner])

    # Pages that a codec has packed

    def add_coded(self, coded: CodedPages, was_split: bool) -> None:
        """Take over packed pages without what is evicted from them."""
        pool, kept_by_lane = coded.pool, self._of_leaders(self._widths > 0)
        lanes_each = self.heads if self.split else 1
        pages, sources, owners = [], [], []
        for lane, (row, head) in enumerate(self._sequences):
            ids = coded.rows[row * lanes_each + head] if was_split else coded.rows[row]
            pages.append(ids)
            sources.append(ids if was_split or not self.split else head * pool.capacity + ids)
            owners.append(np.full(len(ids), lane))
        numbers, owner = np.concatenate(pages), np.concatenate(owners)
        positions = pool.positions[pool.index(numbers)]
        lanes = pool.index(owner)[:, None]
        kept = kept_by_lane[lanes, positions.clamp_min(0).long()] & (positions >= 0)
        counts = kept.sum(dim=1).cpu().numpy()
        stays = np.flatnonzero(counts)
        if not len(stays):
            return
        index, source = pool.index(stays), pool.index(np.concatenate(sources)[stays])
        order = torch.argsort(~kept[index], dim=1, stable=True)
        moves = bool((counts[stays] < pool.count[numbers[stays]]).any())
        keys, values = (_lanes_of(codes, self.page_heads).pick(source) for codes in (pool.keys, pool.values))
        if moves:
            keys, values = reordered(keys, order), reordered(values, order)
        name, ids = self.store.adopt(pool, numbers[stays], keys, values)
        book = self.store.sealed[name]
        book.positions[book.index(ids)] = positions[index].where(kept[index], -1).gather(1, order)
        book.shard[ids] = pool.shard[numbers[stays]]
        self._give({name: (np.arange(len(stays)), ids)}, counts[stays], owner[stays])


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
    places = torch.minimum(torch.arange(page_size, device=kept.device), counts[:, None] - 1)
    return columns[start[:, None] + places], counts, owner
