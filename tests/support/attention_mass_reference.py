"""The share of attention that each page gets, by eager softmax attention in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from budgeted_layer import budgeted_layer
from fake_attachment import ATTENTION, EXPERTS, GROUPS, HEADS, KEY_DIM, SCALE, VALUE_DIM
from padded_masks import only_padding

from pikv_hf.config import PiKVConfig
from pikv_hf.integration.attention_function import pikv_attention_forward
from pikv_hf.layer.layer import PiKVLayer

# A budget that is never reached: nothing goes unless a test says so.
SMALL = {"page_size": 4, "recent_window": 6, "sink_tokens": 4, "num_shards": 3, "budget": 4096, "scheduler": "h2o"}
Page = tuple[str, int]


def make_layer(**options: Any) -> PiKVLayer:
    return budgeted_layer(PiKVConfig(**{**SMALL, **options}))


def causal_mask(valid: torch.Tensor | None, new: int) -> torch.Tensor | None:
    if valid is None:
        return None
    before = valid[:, : valid.shape[1] - new]
    causal = torch.ones(new, new, dtype=torch.bool).tril() & valid[:, None, -new:] & valid[:, -new:, None]
    return only_padding(torch.cat([before[:, None].expand(-1, new, -1), causal], dim=2)[:, None], valid)


def grow(layer: PiKVLayer, new: int, batch: int = 2, valid: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    """Append random tokens and attend; `valid` `(B, T)` says which columns are real. Returns the queries."""
    keys, values = torch.randn(batch, HEADS, new, KEY_DIM), torch.randn(batch, HEADS, new, VALUE_DIM)
    query = torch.randn(batch, HEADS * GROUPS, new, KEY_DIM)
    got = layer.update(keys, values)
    pikv_attention_forward(ATTENTION, query, *got, causal_mask(valid, new), scaling=SCALE, **more)
    layer.record_experts(torch.randint(0, EXPERTS, (batch * new,)))
    return query


def grown(prompt: int = 70, batch: int = 2, padding: int = 0, steps: int = 9, **options: Any) -> PiKVLayer:
    """Return a layer with a prompt, whose first row lacks `padding` tokens, and some decoded tokens."""
    layer = make_layer(**options)
    valid = None
    if padding:
        valid = torch.ones(batch, prompt, dtype=torch.bool)
        valid[0, :padding] = False
    grow(layer, prompt, batch, valid)
    for _ in range(steps):
        valid = None if valid is None else torch.nn.functional.pad(valid, (0, 1), value=True)
        grow(layer, 1, batch, valid)
    layer.settle()
    return layer


def weights(
    layer: PiKVLayer,
    query: torch.Tensor,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return eager softmax attention in float64 of a call's queries over all columns, `(B, Hq, Q, T)`."""
    keys = layer.dense()[0].repeat_interleave(GROUPS, 1).double()
    held = layer.stored_mask().repeat_interleave(GROUPS, 1)
    new = query.shape[2]
    logits = torch.einsum("bhqd,bhtd->bhqt", query.double(), keys) * SCALE
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    later = torch.arange(layer.seen) > torch.arange(layer.seen - new, layer.seen)[:, None]
    logits = logits.masked_fill(~held[:, :, None] | later, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)], dim=3)
    return logits.softmax(dim=3).nan_to_num()[..., : layer.seen]


def by_kv_head(of_queries: torch.Tensor) -> torch.Tensor:
    """Return `(B, Hq, Q, T)` as means over the queries of a KV head, `(B, H, T)`."""
    return of_queries.unflatten(1, (HEADS, GROUPS)).mean(dim=(2, 3))


def pages_of(layer: PiKVLayer) -> Iterator[tuple[int, Page]]:
    """Yield every page that each row of the table holds."""
    for row, sequence in enumerate(layer.table.rows):
        for name in layer.table.pools.by_id():
            for page in sequence.pages(name).tolist():
                yield row, (name, page)


def share_by_head(layer: PiKVLayer, of_tokens: torch.Tensor) -> dict[tuple[int, Page], list[float]]:
    """Return what each page of each row takes of `(B, H, T)`, by KV head."""
    found = {}
    for row, (name, page) in pages_of(layer):
        pool = layer.table.pools.by_id()[name]
        columns = [int(at) for at in pool.positions[page].tolist() if at >= 0]
        mine = of_tokens[row // layer.store.lanes]
        heads = mine if layer.store.lanes == 1 else mine[row % layer.store.lanes][None]
        found[row, (name, page)] = [float(head[columns].sum()) for head in heads]
    return found


def shares_of(layer: PiKVLayer, of_tokens: torch.Tensor) -> dict[Page, float]:
    """Return what pages take of `(B, H, T)`: sums over the rows that hold them, means over KV heads."""
    total: dict[Page, float] = {}
    for (_, page), heads in share_by_head(layer, of_tokens).items():
        total[page] = total.get(page, 0.0) + sum(heads) / len(heads)
    return total


def recorded(layer: PiKVLayer, row: int = 0) -> dict[Page, float]:
    """Return the sums that pages have now; the halved ones for `row=1`."""
    pools = layer.table.pools.by_id()
    return {page: float(pools[page[0]].usage.shares[row, page[1]]) for _, page in pages_of(layer)}


def gained(before: dict[Page, float], after: dict[Page, float]) -> dict[Page, float]:
    return {page: share - before[page] for page, share in after.items()}


def assert_close(found: dict[Page, float], expected: dict[Page, float], tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for page, share in expected.items():
        assert found[page] == pytest.approx(share, abs=tolerance), page


def by_head(layer: PiKVLayer) -> PiKVLayer:
    """Let every KV head keep tokens of its own."""
    layer.keep(torch.rand(layer.batch, HEADS, layer.seen) < 0.7)
    return layer


def parted(layer: PiKVLayer) -> PiKVLayer:
    """Let rows share a past, and all but two of them a present."""
    layer.batch_select_indices(torch.tensor([0, 1, 0, 0]))
    grow(layer, 1, 4)
    layer.batch_select_indices(torch.tensor([0, 1, 1, 2]))
    layer.settle()
    return layer


def share_by_head_and_query(layer: PiKVLayer, of_queries: torch.Tensor) -> list[list[dict[Page, float]]]:
    """Return for each lane and each of its queries what pages take of `(B, Hq, 1, T)`."""
    lanes = of_queries[:, :, 0].unflatten(1, (HEADS, GROUPS)).flatten(0, 1)
    found: list[list[dict[Page, float]]] = [[{} for _ in range(GROUPS)] for _ in lanes]
    for row, (name, page) in pages_of(layer):
        at = layer.table.pools.by_id()[name].positions[page]
        for group in range(GROUPS):
            found[row][group][name, page] = float(lanes[row, group, at[at >= 0].long()].sum())
    return found


def total(layer: PiKVLayer) -> float:
    return sum(recorded(layer).values())
