"""Memory per device stays even, whatever a router does: shards divided by load, and full pages that move."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from device_machine import layout_of
from failing_memory import no_memory_for
from fake_attachment import FakeAttachment
from families import FAMILIES

from pikv_hf import PiKVCache
from pikv_hf.codecs.page_encoder import PageEncoder
from pikv_hf.common.kv import KV
from pikv_hf.config import PiKVConfig
from pikv_hf.distributed.device_layout import PartLayout
from pikv_hf.kernels import decode_pages, encode_pages
from pikv_hf.layer.attend import attend
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.page_migration import MAX_MIGRATED, migrate_pages
from pikv_hf.pages.pool_growth import MIN_GROWTH
from pikv_hf.pages.pool_id import PoolId
from pikv_hf.reports.memory_measure import layer_memory
from pikv_hf.scheduling.page_scheduler import make_scheduler
from pikv_hf.sharding.shard_map import ShardMap

HEADS, DIM, EXPERTS = 2, 16, 8
SMALL: dict[str, Any] = {"page_size": 16, "recent_window": 64, "sink_tokens": 4, "num_shards": 8}
EVEN = np.full(EXPERTS, 1 / EXPERTS)
FAVOURITE = np.where(np.arange(EXPERTS) == 3, 0.8, 0.2 / (EXPERTS - 1))
OTHER = np.where(np.arange(EXPERTS) == 6, 0.8, 0.2 / (EXPERTS - 1))
ZIPF = (1 / np.arange(1, EXPERTS + 1) ** 1.5) / (1 / np.arange(1, EXPERTS + 1) ** 1.5).sum()


class FakeRouters(FakeAttachment):
    def __init__(self) -> None:
        super().__init__()
        self.expert_routers[0].num_experts = EXPERTS


class Reader:
    """Reads random tokens into a layer, as a model whose router chooses experts with given chances."""

    def __init__(self, weights: tuple[float, ...] | None = (1.0, 1.0), batch: int = 1, **options: Any) -> None:
        config = PiKVConfig(**{**SMALL, **options})
        self.layer = PiKVLayer(0, config, FakeRouters(), PartLayout() if weights is None else layout_of(weights))
        if config.tiers is not None:
            for part in self.layer.parts:
                part.scheduler = make_scheduler(config, 1, 0, len(self.layer.parts))
        self.batch = batch
        self.random = np.random.default_rng(5)
        self.generator = torch.Generator().manual_seed(7)
        self.keys = torch.zeros(batch, HEADS, 0, DIM)

    def read(self, tokens: int, chances: np.ndarray = EVEN, at_a_time: int | None = None) -> None:
        while tokens > 0:
            new = min(tokens, at_a_time or tokens)
            keys, values = torch.randn(2, self.batch, HEADS, new, DIM, generator=self.generator)
            experts = self.random.choice(EXPERTS, self.batch * new, p=chances)
            self.layer.update(keys, values)
            self.layer.attend_begins(None)
            self.layer.record_experts(torch.from_numpy(experts))
            self.keys = torch.cat([self.keys, keys], dim=2)
            tokens -= new
        self.layer.settle()

    def output(self) -> torch.Tensor:
        query = torch.randn(self.layer.batch, HEADS * 2, 1, DIM, generator=torch.Generator().manual_seed(3))
        return attend(self.layer, query)[0]

    def outside(self) -> list[int]:
        """Return the tokens in the shards of each part."""
        return [sum(report.shard_tokens) for report in layer_memory(0, self.layer)]


@contextlib.contextmanager
def everything_to_part(number: int) -> Iterator[None]:
    """Fill one part alone, and move nothing."""

    def own(self: ShardMap, shards: np.ndarray, positions: np.ndarray, part: int) -> np.ndarray:
        return shards if part == number else -1 - (number * self.num_shards + shards)

    with mock.patch.object(ShardMap, "own", own), mock.patch("pikv_hf.layer.layer_store.migrate_pages", return_value=0):
        yield


def uneven(tokens: int = 1500, **options: Any) -> Reader:
    reader = Reader(**options)
    with everything_to_part(0):
        reader.read(tokens)
    assert reader.outside()[1] == 0
    return reader


# Balance


def assert_even(reader: Reader, one: Reader) -> None:
    """Every device has its share of the bytes, within 10%, and beside them the window.

    Of packed pages thousands of tokens make few bytes: open pages and what a pool grows by show beside them.
    """
    reports, alone = layer_memory(0, reader.layer), layer_memory(0, one.layer)[0]
    assert sum(report.tokens_stored for report in reports) == alone.tokens_stored
    total, parts = sum(report.total - report.window for report in reports), len(reports)
    page = reader.layer.table.plain.full_page_bytes
    grain = 0 if reader.layer.config.key_codec == "none" else 2 * MIN_GROWTH * page
    for report in reports:
        assert abs(report.total - report.window - total / parts) <= 0.1 * total / parts + grain / 2
        assert report.total <= 1.1 * alone.total / parts + alone.window + grain


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("codec", ["none", "int4"])
@pytest.mark.parametrize("chances", [EVEN, ZIPF, FAVOURITE, np.eye(EXPERTS)[2]], ids=["even", "zipf", "80%", "one"])
@pytest.mark.parametrize("chunk", [None, 1024])
def test_a_skewed_router_fills_devices_evenly(parts: int, codec: str, chances: np.ndarray, chunk: int | None) -> None:
    readers = [
        Reader((1.0,) * parts, key_codec=codec, value_codec=codec),
        Reader(None, key_codec=codec, value_codec=codec),
    ]
    for reader in readers:
        reader.read(5000 if codec == "none" else 8000, chances, at_a_time=chunk)
        reader.read(100, chances, at_a_time=1)
    assert_even(*readers)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("at_a_time", [1, 40, 1000], ids=["decoding", "turns", "chunks"])
def test_a_router_whose_favourite_changes(parts: int, at_a_time: int) -> None:
    """Even at first, then one expert takes most, then another one; balance is looked at all along."""
    reader, one, tokens = Reader((1.0,) * parts), Reader(None), 1600 if at_a_time == 1 else 3000
    moves = []

    def counted(*given: Any) -> None:
        moves.append(migrate_pages(*given))

    with mock.patch("pikv_hf.layer.layer_store.migrate_pages", side_effect=counted):
        for chances in (EVEN, FAVOURITE, OTHER):
            for each in (reader, one):
                each.read(tokens, chances, at_a_time=tokens if chances is EVEN else at_a_time)
            assert_even(reader, one)
    if at_a_time < 1000:
        assert sum(moves) > 0, "no page has moved"
    assert max(moves) <= MAX_MIGRATED
    torch.testing.assert_close(reader.output(), one.output(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.0, 1.0, 1.0), (1.0, 2.0, 5.0)])
def test_devices_with_unequal_shares(weights: tuple[float, ...]) -> None:
    reader = Reader(weights)
    reader.read(3000, ZIPF)
    reader.read(1000, FAVOURITE, at_a_time=1)
    held = np.array(reader.outside())
    wanted = np.array(weights) / sum(weights) * held.sum()
    assert (abs(held - wanted) <= 0.1 * held.sum() / len(weights)).all()


def test_the_cache_reports_it_by_device() -> None:
    """A real model whose router prefers one expert: `memory_report().per_device`."""
    model = FAMILIES["gpt_oss"].build(num_hidden_layers=2, layer_types=["full_attention"] * 2)
    for layer in model.model.layers:
        layer.mlp.router.bias.data[3] += 12
    ids = torch.randint(2, 190, (1, 2500), generator=torch.Generator().manual_seed(1))
    reports = {}
    for devices in (None, ["cpu:0", "cpu:1", "cpu:2"]):
        cache = PiKVCache.for_model(model, devices=devices, **SMALL)
        with torch.no_grad():
            for part in (ids[:, :2400], *ids[:, 2400:].split(1, dim=1)):
                model(part, past_key_values=cache, logits_to_keep=1)
        reports[devices is None] = cache.memory_report()
    alone, spread = reports[True], reports[False]
    assert max(alone.per_shard) > 0.7 * sum(alone.per_shard), "the router is not skewed"
    assert list(spread.per_device) == ["cpu:0", "cpu:1", "cpu:2"]
    assert sum(spread.per_device.values()) == spread.total
    for held in spread.per_device.values():
        assert held <= 1.1 * alone.total / 3 + alone.window
    assert spread.tokens_stored == alone.tokens_stored


# Moves


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "auto", "fp8"])
@pytest.mark.parametrize("batch", [1, 2])
def test_what_moves_stays_what_it_was(codec: str, batch: int) -> None:
    reader = uneven(key_codec=codec, value_codec=codec, batch=batch)
    layer = reader.layer
    layer.batch_repeat_interleave(2)
    before, dense, held = reader.output(), layer.dense(), reader.outside()
    encoded = mock.Mock(side_effect=AssertionError("a page was encoded again"))
    total, moved = 0, 1
    with mock.patch.object(PageEncoder, "encode", encoded):
        while moved := migrate_pages(layer.parts, layer.store.shard_map):
            assert moved <= MAX_MIGRATED
            total += moved
            after = reader.outside()
            assert sum(after) == sum(held)
            assert after[1] == total * SMALL["page_size"], "something else than full pages has moved"
    assert abs(reader.outside()[0] - reader.outside()[1]) <= 0.1 * sum(held)
    # Bit by bit: sums over pages in another order alone change the last digits.
    assert all(torch.equal(new, old) for new, old in zip(layer.dense(), dense, strict=True))
    torch.testing.assert_close(reader.output(), before, atol=1e-5, rtol=1e-5)
    for table in layer.store.tables():
        for name, pool in table.pools.by_id().items():
            pages = [sequence.pages(name) for sequence in {id(row): row for row in table.rows}.values()]
            expected = np.bincount(np.concatenate(pages), minlength=pool.capacity)
            assert (pool.allocator.refcount == expected).all(), "references do not match"
    # Memory is given back where it came from.
    assert all(report.free <= 0.06 * report.total for report in layer_memory(0, layer))


def test_pages_of_the_shards_that_the_target_is_to_have_go_first() -> None:
    reader = uneven()
    layer = reader.layer
    layer.store.shard_map.divide(np.ones(8, dtype=np.int64))
    assert migrate_pages(layer.parts, layer.store.shard_map) > 0
    assert set(np.flatnonzero(layer_memory(0, layer)[1].shard_tokens)) <= {4, 5, 6, 7}


def test_pages_that_a_fork_holds_stay() -> None:
    reader = uneven()
    fork = reader.layer.fork()
    before = reader.outside()
    assert migrate_pages(reader.layer.parts, reader.layer.store.shard_map) == 0
    assert reader.outside() == before
    reader.read(200)
    assert migrate_pages(fork.parts, fork.store.shard_map) == 0
    del fork
    gc.collect()
    reader.layer.settle()
    assert migrate_pages(reader.layer.parts, reader.layer.store.shard_map) > 0
    torch.testing.assert_close(reader.layer.dense()[0], reader.keys)


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("length", [1499, 1203, 700, 37, 3])
def test_a_crop_through_pages_that_moved(codec: str, length: int) -> None:
    reader, one = uneven(key_codec=codec, value_codec=codec), Reader(None, key_codec=codec, value_codec=codec)
    one.read(1500)
    while migrate_pages(reader.layer.parts, reader.layer.store.shard_map):
        pass
    for each in (reader, one):
        each.layer.crop(length)
        each.keys = each.keys[:, :, :length]
    torch.testing.assert_close(reader.layer.dense()[0][:, :, :length], one.layer.dense()[0], atol=0.1, rtol=0.1)
    for each in (reader, one):
        each.read(90)
        each.read(40, at_a_time=1)
    assert bool(reader.layer.stored_mask().all())
    assert sum(reader.outside()) == sum(one.outside())
    torch.testing.assert_close(reader.output(), one.output(), atol=2e-2 if codec == "int8" else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_bounds_for_routing_follow(codec: str) -> None:
    """What routing believes of a page after it has moved is what its keys say."""
    reader = uneven(key_codec=codec, value_codec=codec, routing="page_bound", max_pages=4)
    reader.output()
    while migrate_pages(reader.layer.parts, reader.layer.store.shard_map):
        pass
    table = reader.layer.parts[1].table
    for name, pool in table.pools.by_id().items():
        if len(ids := table.rows[0].full_pages(name)):
            low, high = pool.key_bounds(ids)
            if codec == "none":
                keys = reader.layer.dense()[0][0]
                of_pages = keys[:, pool.positions[ids].long()]
                torch.testing.assert_close(low[:, ids], of_pages.amin(dim=2))
                torch.testing.assert_close(high[:, ids], of_pages.amax(dim=2))
            assert torch.isfinite(low).all()
            assert torch.isfinite(high).all()


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_key_codes_for_routing_follow(codec: str) -> None:
    """They are those of what a page holds where it now is."""
    reader = uneven(key_codec=codec, value_codec=codec, routing="page_mass", max_pages=4)
    reader.output()
    moved = 0
    while count := migrate_pages(reader.layer.parts, reader.layer.store.shard_map):
        moved += count
    assert moved
    table = reader.layer.parts[1].table
    for name, pool in table.pools.by_id().items():
        for page in (ids := table.rows[0].full_pages(name)).tolist():
            index = torch.tensor([page])
            keys = pool.decoded(index, KV.KEYS).unflatten(1, (1, -1))
            expected = decode_pages(encode_pages(keys, "int2", keys=True), torch.float32)
            found = decode_pages(pool.key_codes(ids).pick(index), torch.float32)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_statistics_of_use_follow(tmp_path: Any) -> None:
    reader = uneven(tiers={"cpu": None, "disk": None}, tier_directory=str(tmp_path))
    for _ in range(3):
        reader.output()
    here, there = (part.table.pools for part in reader.layer.parts)
    before = sum(float(pool.usage.shares[0].sum()) for pool in here.by_id().values())
    total = 0
    while moved := migrate_pages(reader.layer.parts, reader.layer.store.shard_map):
        total += moved
    taken = sum(float(pool.usage.shares[0].sum()) for pool in there.packed.values())
    held = [pool.usage.steps[3][pool.allocator.refcount > 0] for pool in there.packed.values()]
    assert sum(map(len, held)) == total > 0
    assert taken > 0.2 * before
    reader.read(60, at_a_time=1)
    torch.testing.assert_close(reader.layer.dense()[0], reader.keys)


def test_rows_that_share_pages_go_on_sharing() -> None:
    reader = uneven()
    reader.layer.batch_repeat_interleave(3)
    reader.batch, reader.keys = 3, reader.keys.repeat_interleave(3, dim=0)
    with mock.patch("pikv_hf.layer.layer_store.migrate_pages", return_value=0):
        reader.read(120, at_a_time=1)
    while migrate_pages(reader.layer.parts, reader.layer.store.shard_map):
        pass
    rows = reader.layer.parts[1].table.rows
    shared = set(rows[0].full) & set(rows[1].full) & set(rows[2].full)
    assert len(shared) > 20
    assert (reader.layer.parts[1].table.plain.allocator.refcount[list(shared)] == 3).all()
    torch.testing.assert_close(reader.layer.dense()[0], reader.keys)
    tokens = sum(report.tokens_stored for report in layer_memory(0, reader.layer))
    assert tokens <= 1500 + 3 * 120 + 3 * 16 * SMALL["num_shards"]


# When nothing moves


@pytest.mark.parametrize("options", [{"budget": 3000}, {"budget": "4MiB"}, {"budget_scope": "shard", "budget": 1500}])
def test_parts_that_evict_are_left_alone(options: dict[str, Any]) -> None:
    reader = uneven()
    for part in reader.layer.parts:
        part.scheduler = make_scheduler(PiKVConfig(**SMALL, **options), 1, 0, 2)
    assert migrate_pages(reader.layer.parts, reader.layer.store.shard_map) == 0


def test_low_rank_pages_stay_with_their_basis() -> None:
    reader = uneven(key_codec="lowrank", value_codec="lowrank", rank=4)
    before = reader.outside()
    assert PoolId.parse("lowrank") in reader.layer.table.pools.packed
    migrate_pages(reader.layer.parts, reader.layer.store.shard_map)
    moved = before[0] - reader.outside()[0]
    assert moved == 0
    assert not reader.layer.parts[1].table.pools.packed[PoolId.parse("lowrank")].allocator.refcount.any()


def test_a_few_pages_do_not_tip_the_scales() -> None:
    reader = uneven(tokens=250)
    assert migrate_pages(reader.layer.parts, reader.layer.store.shard_map) == 0


def test_a_device_that_is_full_gets_nothing_and_stops_nobody() -> None:
    reader = uneven()
    before = reader.outside()
    with no_memory_for(reader.layer, 1) as tried:
        assert migrate_pages(reader.layer.parts, reader.layer.store.shard_map) == 0
    assert tried
    assert reader.outside() == before
    reader.read(100, at_a_time=1)
    assert reader.outside()[1] > 100
    torch.testing.assert_close(reader.layer.dense()[0], reader.keys)
