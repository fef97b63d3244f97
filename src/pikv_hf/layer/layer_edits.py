"""Changing the tokens of a layer: assigned from outside, kept and evicted by presses, cut off, other rows."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ..common.kv import KV
from ..distributed.process_exchange import leaves_others
from ..page_table.cropping import Crop
from ..page_table.equal_rows import equal_rows
from ..page_table.page_table import PageTable
from .input_checks import check_fits, cropped_length
from .kv_assignment import HandedOut, is_selection
from .layer_store import LayerTokens
from .table_rebuild import checked_widths, leaders_of, shares_of, with_exact_ends


class LayerEdits(LayerTokens):
    """A layer whose tokens others than the model change."""

    # Assigning K/V from outside

    @property
    def keys(self) -> torch.Tensor | None:
        """The keys by column, dense; None before the first update. To change them assign keys, then values."""
        return self._staged if self._staged is not None else self._hand_out("keys")

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._staged = keys

    @property
    def awaits_values(self) -> bool:
        """Whether keys were assigned whose values have yet to be."""
        return self._staged is not None

    @property
    def values(self) -> torch.Tensor | None:
        """The values by column, dense; None before the first update. Assigning them completes an assignment."""
        return self._hand_out("values")

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        keys, self._staged = self._staged, None
        if keys is None:
            keys = self._hand_out("keys")
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise TypeError(f"layer {self.layer_idx}: expected tensors of keys and values, got {type(values).__name__}")
        check_fits(self.layer_idx, keys, values, self._kv_format())
        handed = self._handed
        if {"keys", "values"} <= set(handed) and handed["keys"].is_prefix(keys) and handed["values"].is_prefix(values):
            self.truncate(values.shape[2])
        else:
            self._assign(keys, values)

    def _hand_out(self, name: str) -> torch.Tensor | None:
        if self.table is None:
            return None
        self.settle_marks()
        dense = self._dense(KV(name))
        self._handed[name] = HandedOut(dense)
        return dense

    def _assign(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace all tokens: the layer counts them 0..T-1."""
        if self.table is None:
            self.lazy_initialization(keys, values)
        if self._padding_with_pending() is not None:
            raise ValueError(
                f"layer {self.layer_idx}: K/V of {keys.shape[2]} tokens per row were assigned, but rows of this batch "
                "are padded, so a press has taken padding for tokens. Wrap it: pikv_hf.presses.RowwisePress(press)"
            )
        seen = self.positions_seen
        picked = self.attachment is not None and keys.shape[2] <= self.seen and is_selection(keys, self._dense(KV.KEYS))
        # What was evicted was handed out as zeros, and comes back as such: it is no token now either.
        held = (keys != 0).any(dim=-1) | (values != 0).any(dim=-1) if self.state.evicted else None
        leaders = equal_rows([keys[:, :, -1:]], [keys, values])
        # Where the tokens' experts were known they are not any more: they are spread over the shards page by page.
        every = keys.new_ones(keys.shape[:3], dtype=torch.bool) if held is None else held
        split = not torch.equal(every, every[:, :1].expand_as(every))
        tables = []
        for part, own in zip(self.parts, self._shares(every), strict=True):
            tokens = held if own is None else every & own
            table = part.assigned((keys, values), tokens, self.config, self.shard_of(), self.shard_map, leaders, split)
            part.fit(table, self.heads // table.plain.keys.shape[0], keys.shape[2])
            tables.append(table)
        self._interrupt()
        self._drop_pending()
        self._replace_tables(tables)
        if self.shard_map is not None:
            self.shard_map.rescale(0)
            self.shard_map.add_evenly(float(every.sum()) / self.heads)
        self.state.evicted = held is not None and not bool(held.all())
        self.state.seen = self.state.assigned = keys.shape[2]
        # Tokens that were only picked keep the rotation of their positions; what comes next goes on after the last one.
        self.state.dropped = seen - self.state.seen if picked else 0
        self._note_evictions()

    def _shares(self, kept: torch.Tensor) -> list[torch.Tensor | None]:
        """Return for each part of this process which of the tokens `(B, H, T)` are its own; None for all of them."""
        if self.layout.parts == 1:
            return [None]
        owners = shares_of(kept, self.config.page_size, self.layout.weights)
        return [owners == part.location.number for part in self.parts]

    def recode(
        self, key_basis: torch.Tensor | None = None, value_basis: torch.Tensor | None = None, **options: Any
    ) -> None:
        """Choose the codecs of this layer anew, before it has stored a token.

        Parameters
        ----------
        key_basis, value_basis : torch.Tensor, optional
            `(H, D, rank)`, what low-rank codecs would otherwise fit to the first pages.
        **options
            `key_codec`, `value_codec`, `error_budget`, `rank`: see :class:`PiKVConfig`.

        Raises
        ------
        ValueError
            If the layer has stored tokens; what is pending does not count.
        """
        stored = [max(table.tokens(), default=0) for table in self.tables()]
        if any(stored):
            raise ValueError(
                f"layer {self.layer_idx} has stored {max(stored)} tokens; its codecs can be chosen only "
                "before, and a stored token is never packed again"
            )
        self.config = dataclasses.replace(self.config, **options)
        if self.pending is not None:
            self.lazy_initialization(self.pending.keys, self.pending.values)
        for table in self.tables():
            device = table.plain.device
            bases = [None if basis is None else basis.to(device) for basis in (key_basis, value_basis)]
            table.pools.encoders.set_bases(*bases)

    # Evicting

    def begin_press(self) -> None:
        """Wait with the next call's tokens for :meth:`keep`, at the latest until the call after it."""
        self.settle()
        self.awaits_press = True

    def end_press(self) -> None:
        """End :meth:`begin_press`: the tokens are stored as they would have been."""
        self.awaits_press = False
        if self.pending is not None and self.pending.experts is not None:
            self._place(self.pending.experts)

    @leaves_others
    def keep(self, kept: torch.Tensor) -> None:
        """Evict tokens, each KV head its own, and keep the others in the widths given; frees their memory.

        Columns stay what they are: lengths do not change, an evicted token never takes part again. Tokens that a codec
        has packed stay as they are where they are kept.

        Parameters
        ----------
        kept : torch.Tensor
            `(B, H, T)` over all columns. Bool: True keeps a token, as the codecs of the configuration have it outside
            of sinks and recent window. Integers: 0 evicts, 2, 4, 8 and 16 are the bits per number, 16 as the model
            made it.

        Raises
        ------
        ValueError, TypeError
            For a wrong shape, dtype or width; nothing has changed then.
        """
        if self.table is None:
            raise ValueError(f"layer {self.layer_idx} holds no tokens, of which some could be kept")
        if self.attachment is None:
            raise ValueError(
                f"layer {self.layer_idx}: only PiKV's attention can pass over evicted tokens; make the cache with "
                "PiKVCache.for_model(model)"
            )
        widths = checked_widths(kept, (self.batch, self.heads, self.state.seen), f"layer {self.layer_idx}")
        widths = with_exact_ends(widths.to(self.device), self.config)
        tables = self._kept_tables(widths)
        self._interrupt()
        if self.shard_map is not None and widths.numel():
            new = 0 if self.pending is None else self.pending.tokens
            self.shard_map.rescale(float((widths > 0).float().mean()))
            self.shard_map.add_evenly(float((widths[:, :, self.state.seen - new :] > 0).sum()) / self.heads)
        self._drop_pending()
        self._replace_tables(tables)
        self.state.evicted |= bool((widths == 0).any())
        self.awaits_press = False
        self._note_evictions()

    def _kept_tables(self, widths: torch.Tensor) -> list[PageTable]:
        """Return a table of each part for what is kept, `(B, H, T)` widths; the old ones stay as they are."""
        assert self.table is not None
        leaders = leaders_of(self.table, self.pending, widths)
        split = self.lanes > 1 or not torch.equal(widths, widths[:, :1].expand_as(widths))
        new = 0 if self.pending is None else self.pending.tokens
        stored = self.state.seen - new
        shares = [None] if not new and self.layout.parts == 1 else self._shares(widths[:, :, stored:] > 0)
        tables = []
        for part, own in zip(self.parts, shares, strict=True):
            assert part.table is not None
            mine = widths
            if own is not None:
                # What is stored stays in the part that has it; what is new is divided.
                held = part.table.view.stored_mask(stored).to(self.device).view(self.batch, self.lanes, stored)
                mine = widths * torch.cat([held.expand(-1, self.heads, -1), own], dim=2)
            table = part.kept(self.pending, mine, self.config, self.shard_of(), self.shard_map, leaders, split)
            part.fit(table, self.heads // table.plain.keys.shape[0], self.state.seen)
            tables.append(table)
        return tables

    def packed_pages(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the pages of what is kept or packed: they stay as they are, or go as a whole.

        Returns
        -------
        tuple of torch.Tensor
            `(n,)` int64 sequences, `(n, H, P)` int64 columns of the page's tokens in each KV head, -1 where it has
            none, and `(n,)` int64 bytes. Pages that several sequences share come once for each.
        """
        found = [_packed_pages(table, self.heads, self.lanes, self.device) for table in self.tables()]
        if not found:
            empty = torch.zeros(0, dtype=torch.int64, device=getattr(self, "device", None))
            return empty, empty.new_zeros((0, 1, self.config.page_size)), empty
        rows, columns, sizes = (torch.cat(each) for each in zip(*found, strict=True))
        return rows, columns, sizes

    def settle_marks(self) -> None:
        """Evict what kvpress's head-wise presses have only marked on the attention module."""
        marks = None if self.attachment is None else self.attachment.take_marks(self)
        if marks is None or self.table is None:
            return
        if self._padding_with_pending() is not None:
            raise ValueError(
                f"layer {self.layer_idx}: a press has marked tokens of rows that are padded, and has taken padding for "
                "tokens. Wrap it: pikv_hf.presses.RowwisePress(press)"
            )
        kept = torch.ones((self.batch, self.heads, self.state.seen), dtype=torch.bool, device=self.device)
        rows, heads, columns = (torch.as_tensor(part, device=self.device) for part in marks)
        if columns.numel() and int(columns.max()) >= self.state.seen:
            raise ValueError(
                f"layer {self.layer_idx}: a press marked token {int(columns.max())}, but the layer has {self.seen}"
            )
        kept[rows, heads, columns] = False
        self.keep(kept)

    # Shortening

    def may_return(self) -> None:
        """Be ready to be cut back to the present length exactly, whatever gets packed after it.

        kvpress's pipeline asks each layer's length before a question and cuts the answer off afterwards.
        """
        self._returns = True

    def _remember(self) -> None:
        if self._returns and self.table is not None:
            pages = [table.pools for table in self.tables()]
            # It would hold on to what a budget in bytes has to get rid of.
            free = all(each.plain.growth_limit is None for each in pages)
            forks = [
                (table.fork(), {name for name, pool in table.pools.packed.items() if pool.allocator.refcount.any()})
                for table in (self.tables() if pages[0].encoders.packs and free else [])
            ]
            self._checkpoint = (self.state.seen, forks) if forks else None
        self._returns = False

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions, or remove the last `-max_length`; see :func:`cropped_length`.

        Raises
        ------
        ValueError
            Where K/V were assigned from outside and the length reaches into them: their positions are not known.
        """
        self.truncate(self.column_of(cropped_length(self.positions_seen, max_length)))

    def column_of(self, length: int) -> int:
        """Return the columns that remain of the model's first `length` positions."""
        dropped, assigned = self.state.dropped, self.state.assigned
        if length >= self.positions_seen or not dropped or length >= assigned + dropped:
            return max(0, length - dropped)
        raise ValueError(
            f"layer {self.layer_idx}: cannot crop to {length} positions: of the first {assigned + dropped}, "
            f"{assigned} tokens were assigned from outside, and which ones is not known"
        )

    @leaves_others
    def truncate(self, length: int) -> None:
        """Keep the first `length` columns."""
        if length >= self.state.seen or self.table is None:
            return
        if self.pending is not None and length <= self.state.seen - self.pending.tokens:
            self.pending = None
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is not None and checkpoint[0] == length:
            self.pending = None
            for part, (table, pools) in zip(self.parts, checkpoint[1], strict=True):
                part.table = table
                table.pools.forget_pools(pools)
        else:
            self.settle()
            self._crop_tables(length)
        if self.shard_map is not None:
            self.shard_map.rescale(length / self.state.seen)
        self.state.seen = length
        self.state.assigned = min(self.state.assigned, length)
        self._interrupt()

    def _crop_tables(self, length: int) -> None:
        """Cut the tables of all parts, or none if one of them cannot be cut for want of memory."""
        tables = self.tables()
        crops = [Crop(table, length) for table in tables]
        for part, cut in zip(self.parts, crops, strict=True):
            part.with_room(self.state.seen, cut.reserve)
        self._note_evictions()
        with ExitStack() as stack:
            for table in tables:
                # Copying a page that a slower tier has may fail.
                stack.enter_context(table.pools.transaction())
            for cut in crops:
                cut.prepare()
        for cut in crops:
            cut.finish()

    # Changing rows

    @leaves_others
    def select(self, indices: Sequence[int]) -> None:
        """Replace the rows of the batch by those at `indices`. No token is copied."""
        if self.table is None:
            return
        self.settle_marks()
        lanes = self.lanes
        for part in self.parts:
            part.select(indices, lanes)
        self._checkpoint = None
        self._handed = {}
        if self.pending is not None:
            self.pending = self.pending.select(torch.as_tensor(list(indices), device=self.device))
        if self.state.padding is not None:
            self.state.padding = self.state.padding[list(indices)]
        for part in self.parts:
            part.enforce(lanes, self.state.seen)
        self._note_evictions()

    def reset(self) -> None:
        """Forget everything and return the memory."""
        self._clear()

    def _copy_to(self, twin: Any) -> None:
        """Give another layer this one's tokens; both share all pages until either writes to them."""
        self.settle()
        for part, copy in zip(self.parts, twin.parts, strict=True):
            part.copy_to(copy)
        if self.table is not None:
            twin.heads, twin.dtype, twin.device = self.heads, self.dtype, self.device
        twin.state, twin.shard_map = self.state.copy(), self.shard_map
        twin.leads, twin.prompt_mark = self.leads, self.prompt_mark


def _packed_pages(
    table: PageTable, heads: int, lanes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the pages of one part; see :meth:`LayerEdits.packed_pages`."""
    rows, columns, sizes = [], [], []
    size = table.plain.page_size
    for name, pool in table.pools.packed.items():
        for row, sequence in enumerate(table.rows):
            pages = sequence.pages(name)
            positions = pool.positions[pool.index(pages)].long().to(device)
            by_head = positions.new_full((len(pages), heads, size), -1)
            head = slice(None) if lanes == 1 else slice(row % lanes, row % lanes + 1)
            by_head[:, head] = positions[:, None]
            rows.append(torch.full((len(pages),), row // lanes, device=device))
            columns.append(by_head)
            # With its positions, its entry in the table, and what the host knows of it.
            each = pool.page_bytes + 4 * size + 8 + pool.host_bytes // max(1, pool.capacity)
            sizes.append(torch.full((len(pages),), each, device=device))
    if not rows:
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        return empty, empty.new_zeros((0, 1, size)), empty
    return torch.cat(rows), torch.cat(columns), torch.cat(sizes)
