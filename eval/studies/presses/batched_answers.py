"""Write the answers to one question from many compressed caches at once, a row for each.

Rows keep different tokens, heads of a row perhaps too. They are padded to the longest of a layer and the padding is
hidden by a mask; queries keep the positions that they have behind the whole text. Rows that have ended leave the batch.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache
from transformers.cache_utils import DynamicLayer

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.presses.one_reading import Kept

#: Most rows of a batch, and the most bytes of its keys and values.
ROWS, BYTES = 48, 2 << 30
#: Rows are taken out of a batch once so few are left of it: copying what remains has to pay.
OPEN = 0.6

_ATTENTION = "pikv_batched_answers"


class RowsLayer(DynamicLayer):
    """A layer that holds the kept tokens of all rows, padded, with room for what comes.

    Parameters
    ----------
    rows : sequence of tuple
        For each row keys and values `(1, H, n, D)` and which are hidden, `(1, H, n)` or None.
    room : int
        New tokens to come.
    """

    def __init__(self, rows: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], room: int) -> None:
        super().__init__()
        packed = [_packed(*row) for row in rows]
        longest = max(keys.shape[1] for keys, _, _ in packed)
        heads, _, dim = packed[0][0].shape
        shape = (len(rows), heads, longest + room)
        self.keys = packed[0][0].new_zeros(*shape, dim)
        self.values = packed[0][1].new_zeros(*shape, packed[0][1].shape[-1])
        self.seen = torch.zeros(shape, dtype=torch.bool)
        for row, (keys, values, seen) in enumerate(packed):
            self.keys[row, :, : keys.shape[1]], self.values[row, :, : keys.shape[1]] = keys, values
            self.seen[row, :, : keys.shape[1]] = seen
        self.seen[:, :, longest:] = True
        self.length, self.is_initialized = longest, True
        self.dtype, self.device = self.keys.dtype, self.keys.device

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens behind the others, and return all."""
        end = self.length + keys.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = keys, values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Return how many columns there are."""
        return self.length

    def take(self, rows: torch.Tensor) -> None:
        """Keep these rows."""
        self.keys, self.values, self.seen = self.keys[rows], self.values[rows], self.seen[rows]


def _packed(
    keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a row's tokens `(H, n, D)` without those that are hidden in all heads' own order, and which are real."""
    if hidden is None:
        return keys[0], values[0], torch.ones(keys.shape[1:3], dtype=torch.bool)
    order = hidden[0].int().argsort(dim=-1, stable=True)[:, : int((~hidden[0]).sum(-1).max())]
    gathered = [part[0].gather(1, order[..., None].expand(-1, -1, part.shape[-1])) for part in (keys, values)]
    return gathered[0], gathered[1], ~hidden[0].gather(1, order)


@torch.no_grad()
def answers(
    model: Any, rows: Sequence[Kept], question: torch.Tensor, limit: int, ends: Sequence[int]
) -> list[list[int]]:
    """Return what each row's cache answers to a question `(1, Q)`, greedily: token ids, an end token included.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder whose attention is called through transformers' interface.
    rows : sequence of Kept
        What presses left; not changed.
    question : torch.Tensor
        Read before the answer, at each row's position.
    limit : int
        Most tokens of an answer.
    ends : sequence of int
        End tokens.
    """
    found: dict[int, list[int]] = {}
    for batch in _batches(rows, question.shape[1] + limit):
        written = _write(model, [rows[row] for row in batch], question, limit, frozenset(ends))
        found |= dict(zip(batch, written, strict=True))
    return [found[row] for row in range(len(rows))]


def _batches(rows: Sequence[Kept], room: int) -> Iterator[list[int]]:
    """Put rows of like length together."""
    order = sorted(range(len(rows)), key=lambda row: _most(rows[row]))
    token_bytes = sum(layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes for layer in rows[0].cache.layers)
    batch: list[int] = []
    for row in order:
        size = (len(batch) + 1) * (_most(rows[row]) + room) * token_bytes
        if batch and (len(batch) == ROWS or size > BYTES):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _most(row: Kept) -> int:
    """Return the tokens of a row's longest layer."""
    return max(int(layer.keys.shape[2]) for layer in row.cache.layers)


def _write(model: Any, rows: Sequence[Kept], ids: torch.Tensor, limit: int, ends: frozenset[int]) -> list[list[int]]:
    room = ids.shape[1] + limit
    layers = [
        RowsLayer([(row.cache.layers[at].keys, row.cache.layers[at].values, row.hidden[at]) for row in rows], room)
        for at in range(len(rows[0].cache.layers))
    ]
    cache = Cache(layers=layers)
    positions = torch.tensor([row.position for row in rows])[:, None] + torch.arange(ids.shape[1])
    ids, places = ids.expand(len(rows), -1), torch.arange(len(rows))
    written: list[list[int]] = [[] for _ in rows]
    with _attending(model, layers):
        while True:
            logits = model(input_ids=ids, **cache_argument(cache), position_ids=positions, logits_to_keep=1).logits
            new = logits[:, -1].argmax(-1)
            for place, token in zip(places.tolist(), new.tolist(), strict=True):
                if not _has_ended(written[place], limit, ends):
                    written[place].append(token)
            going = torch.tensor([not _has_ended(written[place], limit, ends) for place in places.tolist()])
            if not going.any():
                return written
            ids, positions = new[:, None], positions[:, -1:] + 1
            if going.float().mean() <= OPEN:
                left = going.nonzero().squeeze(1)
                for layer in layers:
                    layer.take(left)
                ids, positions, places = ids[left], positions[left], places[left]


def _has_ended(written: Sequence[int], limit: int, ends: frozenset[int]) -> bool:
    return len(written) == limit or (len(written) > 0 and written[-1] in ends)


@contextmanager
def _attending(model: Any, layers: Sequence[RowsLayer]) -> Generator[None, None, None]:
    """Have a model's attention pass over the padding of these layers, and over what is hidden."""

    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        seen = layers[int(module.layer_idx)].seen[:, :, : key.shape[2]]  # type: ignore[arg-type]
        return _attention(query, key, value, seen, scaling), None

    before = model.config._attn_implementation
    AttentionInterface.register(_ATTENTION, attend)
    try:
        # Without a mask function of this name the model makes no mask.
        model.set_attn_implementation(_ATTENTION)
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attend from `(B, Hq, Q, D)` over `(B, H, T, D)`, the last Q the queries' own, where `(B, H, T)` is `seen`."""
    batch, query_heads, queries, dim = query.shape
    heads, tokens = key.shape[1:3]
    order = torch.arange(tokens) - (tokens - queries)
    causal = order <= torch.arange(queries)[:, None]
    mask = (seen[:, :, None] & causal)[:, :, None].expand(-1, -1, query_heads // heads, -1, -1)
    # The query heads of a KV head are read as further queries of it, which copies no K/V.
    folded = query.reshape(batch, heads, -1, dim)
    out = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=mask.reshape(batch, heads, -1, tokens), scale=scaling
    )
    return out.view(batch, query_heads, queries, -1).transpose(1, 2)
