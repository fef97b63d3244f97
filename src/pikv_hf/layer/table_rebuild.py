"""Building a layer's tables anew: of what a press keeps, or of K/V that were assigned from outside."""

import dataclasses
from collections.abc import Sequence

import torch

from ..config import PiKVConfig
from ..page_table.compaction import (
    AS_CONFIGURED,
    WIDTHS,
    CodedPages,
    Compaction,
    ExactTokens,
    bits_of,
    is_narrower,
)
from ..page_table.equal_rows import equal_rows
from ..page_table.page_table import PageTable
from ..page_table.sequence_writer import SequenceWriter, ShardOf
from ..pages.pool_id import PLAIN, UNCODED, PoolId
from ..sharding.shard_map import GOLDEN, ShardMap
from ..tiers.tier_limits import LayerTiers
from .pending_tokens import PendingTokens


def checked_widths(kept: torch.Tensor, shape: tuple[int, int, int], where: str) -> torch.Tensor:
    """Return what is to be kept as `(B, H, T)` uint8 widths.

    Parameters
    ----------
    kept : torch.Tensor
        `(B, H, T)`: bool, or integers 0 (evict), 2, 4, 8 or 16 bits.
    shape : tuple of int
        What is expected.
    where : str
        For the message.

    Raises
    ------
    ValueError, TypeError
        For another shape, dtype or width.
    """
    if tuple(kept.shape) != shape:
        raise ValueError(f"{where}: expected (batch, heads, tokens) = {shape} of what to keep, got {tuple(kept.shape)}")
    if kept.dtype == torch.bool:
        return kept.to(torch.uint8) * AS_CONFIGURED
    if kept.is_floating_point() or kept.is_complex():
        raise TypeError(f"{where}: what to keep must be bool or integer widths in bits, got {kept.dtype}")
    known = {0, *WIDTHS}
    if bad := set(torch.unique(kept).tolist()) - known:
        raise ValueError(f"{where}: widths must be among {sorted(known)} bits, got {sorted(bad)[0]}")
    return kept.to(torch.uint8)


def with_exact_ends(widths: torch.Tensor, config: PiKVConfig) -> torch.Tensor:
    """Keep sinks and recent window exact where the codecs decide, and everything where there is none."""
    columns = torch.arange(widths.shape[-1], device=widths.device)
    exact = (columns < config.sink_tokens) | (columns >= widths.shape[-1] - config.recent_window)
    if config.key_codec == config.value_codec == "none":
        exact = torch.ones_like(exact)
    return widths.where(~(exact & (widths == AS_CONFIGURED)), 16)


@dataclasses.dataclass(frozen=True, slots=True)
class TableRebuild:
    """How the tables of all parts of a layer are built anew.

    Attributes
    ----------
    config : PiKVConfig
        Options of the layer.
    shard_of : callable
        Where later tokens go.
    shard_map : ShardMap or None
        Which part has which shard, where there are several.
    leaders : list of int
        For each of the B rows the first row of which the same is kept; see :func:`leaders_of`.
    split : bool
        Whether heads keep different tokens, in any part of the layer.
    """

    config: PiKVConfig
    shard_of: ShardOf
    shard_map: ShardMap | None
    leaders: list[int]
    split: bool

    def kept_table(self, table: PageTable, pending: PendingTokens | None, widths: torch.Tensor) -> PageTable:
        """Return a table of its own for what is kept of a part; the old one stays as it is.

        Parameters
        ----------
        table : PageTable
            What is stored.
        pending : PendingTokens, optional
            The newest tokens, on the table's device.
        widths : torch.Tensor
            `(B, H, T)` uint8, see :class:`Compaction`.
        """
        was_split = table.plain.keys.shape[0] != widths.shape[1]
        # A low-rank basis belongs to a head: pages of one head cannot share it.
        decoded = [PLAIN, UNCODED] + [pool for pool in table.pools.packed if self.split and pool.is_lowrank]
        exact = _exact_tokens(table, pending, widths, decoded)
        kept = Compaction(widths, self.leaders, exact, self.config, self.split, table.pools.tiers)
        with kept.retired_on_error():
            if not self.split:
                kept.pools.encoders.inherit_bases(table.pools.encoders)
            kept.add_exact()
            for pool_id, pool in table.pools.packed.items():
                if pool_id not in decoded:
                    rows = [row.pages(pool_id) for row in table.rows]
                    kept.add_coded(CodedPages(pool, rows, bits_of(pool_id)), was_split)
        return self._table_of(kept)

    def assigned_table(self, tokens: ExactTokens, tiers: LayerTiers | None) -> PageTable:
        """Return a table of K/V from outside at positions 0..T-1, where these hold a token."""
        widths = with_exact_ends(tokens.stored.to(torch.uint8) * AS_CONFIGURED, self.config)
        kept = Compaction(widths, self.leaders, tokens, self.config, self.split, tiers)
        with kept.retired_on_error():
            kept.add_exact()
        return self._table_of(kept)

    def _table_of(self, kept: Compaction) -> PageTable:
        # The sinks are among what is kept: later tokens have none of their own.
        writer = SequenceWriter(kept.pools, self.config.num_shards, self.config.recent_window, 0, self.shard_of)
        table = PageTable.from_rows(writer, kept.rows)
        for pool_id in kept.pools.by_id():
            kept.pools.compact(pool_id)
        return table


def _exact_tokens(
    table: PageTable, pending: PendingTokens | None, widths: torch.Tensor, pool_ids: list[PoolId]
) -> ExactTokens:
    """Return the tokens that are packed anew: those of these pools, and of others what is to have fewer bits."""
    batch, heads, columns = widths.shape
    stored = columns - (0 if pending is None else pending.tokens)
    is_new = None
    if pending is not None:
        is_new = torch.ones((batch, heads, pending.tokens), dtype=torch.bool, device=pending.keys.device)
        if pending.valid is not None:
            is_new &= pending.valid[:, None]
        if not stored:
            return ExactTokens(pending.keys, pending.values, is_new)

    def stored_in(pools: list[PoolId]) -> torch.Tensor:
        mask = table.view.stored_mask(stored, pools)
        return mask.view(batch, len(table.rows) // batch, stored).expand(batch, heads, stored)

    is_stored, opened = stored_in(pool_ids), list(pool_ids)
    for pool_id in table.pools.packed:
        narrower = is_narrower(widths[:, :, :stored], bits_of(pool_id))
        if pool_id not in pool_ids and bool((narrower := narrower & stored_in([pool_id])).any()):
            is_stored, opened = is_stored | narrower, [*opened, pool_id]
    keys, values = (part.reshape(batch, heads, *part.shape[2:]) for part in table.view.dense(stored, opened))
    if pending is None or is_new is None:
        return ExactTokens(keys, values, is_stored)
    return ExactTokens(
        torch.cat([keys, pending.keys], dim=2),
        torch.cat([values, pending.values], dim=2),
        torch.cat([is_stored, is_new], dim=2),
    )


def leaders_of(table: PageTable, pending: PendingTokens | None, widths: torch.Tensor) -> list[int]:
    """Return for each row the first row with the same past and the same new tokens of which the same is kept."""
    batch = widths.shape[0]
    lanes = len(table.rows) // batch
    past = torch.tensor([id(row) for row in table.rows]).view(batch, lanes)
    if pending is None:
        return equal_rows([past], [widths])
    return equal_rows([past, pending.keys[:, :, -1]], [widths, pending.valid, pending.keys, pending.values])


def part_of_tokens(kept: torch.Tensor, page_size: int, weights: Sequence[float]) -> torch.Tensor:
    """Return to which part each kept token goes: those of a KV head are divided a page at a time.

    Parameters
    ----------
    kept : torch.Tensor
        `(B, H, T)` bool.
    page_size : int
        Tokens per page.
    weights : sequence of float
        In which proportion parts get tokens.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` int64, the part of each token.
    """
    page = (kept.cumsum(dim=2) - 1).clamp_min(0) // page_size
    total = sum(weights)
    ends = torch.tensor([sum(weights[: n + 1]) / total for n in range(len(weights) - 1)], dtype=torch.float64)
    # Of n pages each part gets as many as its weight says, up to one page.
    fraction = (page.double() + 0.5) * GOLDEN % 1.0
    return torch.bucketize(fraction, ends.to(fraction.device), right=True)
