"""Layers of latents filled with random tokens: one KV head, whose values are the rotary parts of its keys."""

from typing import Any

import torch
from fake_attachment import EXPERTS, FakeAttachment

from pikv_hf.common.kv import KV
from pikv_hf.config import PiKVConfig
from pikv_hf.distributed.device_layout import PartLayout
from pikv_hf.kernels.page_codes import BITS, spread_values
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.layer_part import make_parts
from pikv_hf.pages.pool_id import PoolId
from pikv_hf.scheduling.page_scheduler import make_scheduler

LATENT, ROTARY, QUERY_HEADS, SCALE = 16, 6, 5, 0.25
SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 6, "sink_tokens": 4, "num_shards": 3}


class LatentAttachment(FakeAttachment):
    """An attached model of one layer with latent attention."""

    def absorbs(self, layer_idx: int) -> bool:
        return True

    def caches_latents(self, layer_idx: int) -> bool:
        return True

    def refer(self, layer: PiKVLayer) -> None:
        pass


def make_layer(**options: Any) -> PiKVLayer:
    config, layout = PiKVConfig(**{**SMALL, **options}), PartLayout()
    scheduler = make_scheduler(config, 1, 0, query_groups=QUERY_HEADS)
    return PiKVLayer(0, config, LatentAttachment(), layout, make_parts(0, config, layout, [scheduler], latent=True))


def new_queries(batch: int, new: int = 1) -> torch.Tensor:
    return torch.randn(batch, QUERY_HEADS, new, LATENT + ROTARY)


def grow(
    layer: PiKVLayer, latents: torch.Tensor, rotary: torch.Tensor, query: torch.Tensor | None = None
) -> torch.Tensor:
    """Append tokens `(B, 1, n, R)` and `(B, 1, n, Dr)`; return what queries, by default random, made of all tokens."""
    batch, _, new, _ = latents.shape
    layer.settle()
    layer.update(latents, rotary)
    layer.attend_begins(None)
    out, _ = attend(layer, new_queries(batch, new) if query is None else query, scale=SCALE, absorbed=True)
    layer.attend_ends()
    layer.record_experts(torch.randint(0, EXPERTS, (batch * new,)))
    layer.settle()
    return out


def grown(prompt: int = 90, batch: int = 2, size: float = 1.0, steps: int = 3, **options: Any) -> PiKVLayer:
    """Return a layer with random tokens, whose channels are of unlike sizes and off the middle."""
    layer = make_layer(**options)
    sizes, middles = size * torch.randn(2, LATENT + ROTARY).exp()
    for new in (prompt, *[1] * steps):
        keys = torch.randn(batch, 1, new, LATENT + ROTARY) * sizes + middles
        grow(layer, *keys.split([LATENT, ROTARY], dim=-1))
    return layer


def pages_of(layer: PiKVLayer, row: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """Return for each full page of a row its column, its decoded keys `(P, R + Dr)`, and how far bounds may miss them.

    The last, `(R + Dr,)`: of integer codes half a step in channels with more bits, and the rounding of floors.
    """
    assert layer.table is not None
    parts = [layer.table.view.dense_part(layer.seen, which)[row, 0].double() for which in (KV.KEYS, KV.VALUES)]
    keys, index, found = torch.cat(parts, dim=-1), layer.table.view.full_pages(), []
    for pool_id, part in index.columns.items():
        pool = index.pools[pool_id]
        for column in range(part.start, part.stop):
            if index.valid[row, column]:
                number = int(index.pages[row, column])
                positions = [each for each in pool.positions[number].tolist() if each >= 0]
                found.append((column, keys[positions], _misses(pool, pool_id, number)))
    return found


def _misses(pool: Any, pool_id: PoolId, number: int) -> torch.Tensor:
    misses = torch.zeros(LATENT + ROTARY, dtype=torch.float64)
    if not pool_id.name.startswith(tuple(BITS)):
        return misses
    (codes, _), single = pool.codes_at(torch.tensor([number])), 0
    misses[:LATENT] = 2**-10 * codes.floor[0, single].double().abs()
    outliers = codes.outliers[0, single].long()
    misses[outliers] += spread_values(codes.spread[0, single]).double()[outliers] / codes.levels / 2
    return misses
