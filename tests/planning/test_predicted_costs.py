"""Predictions of a plan: capacity of shards, bytes against real caches, and times."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GPU, LAYER, MODEL

from pikv_hf import PiKVConfig
from pikv_hf.eval.bench.decode import _decode_inputs, _our_step, filled_pikv, geometry_model
from pikv_hf.eval.studies.planning.plan_validation_memory import (
    filled,
    memory_cells,
    part_cells,
    part_errors,
    small_model,
)
from pikv_hf.planning.cache_contents import CacheContents
from pikv_hf.planning.cache_memory import cache_bytes, packed_page_bytes, part_bytes
from pikv_hf.planning.calibration import calibrated_cpu
from pikv_hf.planning.capacity import expected_pages, measured_loads, shard_capacity, uniform_loads
from pikv_hf.planning.hardware import DEVICES, Device, find_device, parse_devices
from pikv_hf.planning.model_shape import shape_of
from pikv_hf.planning.plan import Workload, lay_out
from pikv_hf.planning.step_time import (
    attention_seconds,
    collective_seconds,
    crossover,
    result_bytes,
    sent_bytes,
    step_time,
)
from pikv_hf.sharding.placement import expert_placement

pytestmark = pytest.mark.slow

# Devices


def test_devices_are_found_by_number_and_name():
    assert parse_devices("8xH200") == (8, DEVICES["H200"])
    assert parse_devices(" h100 ") == (1, DEVICES["H100"])
    assert parse_devices("2 x rtx4090") == (2, DEVICES["RTX4090"])
    assert find_device("CPU") is DEVICES["cpu"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("8xH20", "'H20', did you mean 'H200'"), ("0xH200", "at least 1, got 0"), ("-1xH200", "got -1"), ("", "got ''")],
)
def test_impossible_devices_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_devices(text)
    with pytest.raises(ValueError, match="bandwidth of device 'x' must be positive, got 0"):
        Device("x", 1, 0, 1, 0, 1, 0)


# Capacity of shards


@pytest.mark.parametrize("loads", [uniform_loads(8), (0.4, 0.3, 0.2, 0.1)])
def test_overflow_is_that_of_simulated_shards(loads):
    tokens, runs = 4000, 200_000
    counts = np.random.default_rng(1).multinomial(tokens, loads, size=runs)
    for z in (1.0, 2.0):
        room = shard_capacity(tokens, loads, z)
        worst = int(np.argmax(loads))
        assert room.tokens == math.ceil(tokens * loads[worst] + z * math.sqrt(tokens * loads[worst]))
        assert room.overflow == pytest.approx((counts[:, worst] > room.tokens).mean(), abs=0.003)
        rooms = np.ceil(np.array(loads) * tokens + z * np.sqrt(np.array(loads) * tokens))
        assert (counts > rooms).any(axis=1).mean() <= room.any_overflow + 0.003


def test_measured_loads_follow_the_placement_of_experts():
    counts = np.random.default_rng(2).integers(0, 50, 60)
    experts = torch.from_numpy(np.repeat(np.arange(60), counts))
    shards = expert_placement(60, 8, 0)(torch.zeros_like(experts), experts)
    assert measured_loads(counts.tolist(), 8) == pytest.approx(
        (np.bincount(shards, minlength=8) / counts.sum()).tolist()
    )
    assert len(measured_loads([1, 2], 8)) == 2


def test_capacity_refuses_what_is_no_share():
    with pytest.raises(ValueError, match=r"add up to 1, got a sum of 1\.1"):
        shard_capacity(10, (0.5, 0.6))
    with pytest.raises(ValueError, match="got -1 and 3"):
        shard_capacity(-1, (1.0,))
    with pytest.raises(ValueError, match="got 0"):
        uniform_loads(0)
    with pytest.raises(ValueError, match=r"positive sum, got \[0, 0\]"):
        measured_loads([0, 0], 2)


@pytest.mark.parametrize("tokens", [0, 40, 300, 20_000])
def test_expected_pages_are_those_of_simulated_shards(tokens):
    loads = (0.5, 0.25, 0.15, 0.1)
    counts = np.random.default_rng(3).multinomial(tokens, loads, size=20_000)
    begun, full = expected_pages(tokens, loads, 32)
    assert begun == pytest.approx(np.ceil(counts / 32).sum(axis=1).mean(), abs=0.05)
    assert full == pytest.approx((counts // 32).sum(axis=1).mean(), abs=0.05)


# Bytes


@pytest.mark.parametrize(
    ("model", "codec", "size"),
    [
        ("qwen3_moe, 4 x 128", "none", (4096, 2, 0)),
        ("qwen3_moe, 4 x 128", "int4", (4096, 1, 0)),
        ("qwen3_moe, 4 x 128", "lowrank", (6000, 1, 0)),
        ("deepseek_v2, 8 x 192 / 128", "int8", (4096, 1, 0)),
        ("gpt_oss, 8 x 64, half sliding", "fp8", (4096, 1, 0)),
        ("mixtral, 8 x 128", "none", (4096, 1, 80)),
    ],
)
def test_predicted_bytes_are_within_two_percent_of_real_caches(model, codec, size):
    torch.manual_seed(0)
    (cell,) = memory_cells([model], [codec], [size])
    assert cell.predicted == pytest.approx(cell.measured, rel=0.02)


@pytest.mark.parametrize("routing", ["page_bound", "page_mass"])
def test_what_routing_keeps_of_pages_is_counted(routing):
    torch.manual_seed(0)
    model = geometry_model()
    keys = torch.randn(1, 4, 6000, 128)
    storage = {"routing": routing, "max_pages": 8, "page_size": 16}
    cache = filled_pikv(model, keys, keys, **storage)
    with torch.no_grad():
        _our_step(cache, model.model.layers[0].self_attn, *_decode_inputs(1))
    shape = shape_of(model.config, "layer", dtype="float32")
    for changed, matters in ((storage, False), ({"page_size": 16}, True)):
        predicted = cache_bytes(shape, CacheContents(6001, 1, PiKVConfig.from_dict(changed), generated=1)).total
        assert abs(predicted / cache.nbytes - 1) > 0.04 if matters else abs(predicted / cache.nbytes - 1) < 0.02


def test_parts_have_the_window_and_an_equal_share():
    options = PiKVConfig()
    whole = cache_bytes(MODEL, CacheContents(50_000, 2, options))
    assert part_bytes(MODEL, CacheContents(50_000, 2, options), 1) == whole
    part = part_bytes(MODEL, CacheContents(50_000, 2, options), 4)
    assert part.window == whole.window
    assert part.shards == pytest.approx(whole.shards / 4, rel=0.01)
    fullest = part_bytes(MODEL, CacheContents(50_000, 2, options), 4, imbalance=0.1)
    assert fullest.shards == pytest.approx(1.1 * part.shards, rel=0.01)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        part_bytes(MODEL, CacheContents(50_000, 2, options), 0)


def test_predicted_bytes_of_parts_are_within_two_percent_of_a_divided_cache():
    torch.manual_seed(0)
    (cell,) = part_cells(["qwen3_moe, 4 x 128"], ["none"], [(4096, 1, 4)])
    assert abs(cell.error) < 0.02
    assert 0 <= cell.fullest < 0.1


def test_sliding_layers_are_of_every_process_and_divided_over_devices():
    sliding = dataclasses.replace(MODEL, layers=(dataclasses.replace(LAYER, sliding=127),) * 8)
    whole = cache_bytes(sliding, CacheContents(4096, 2, PiKVConfig())).total
    assert whole == 8 * 2 * 127 * LAYER.width * 2
    assert part_bytes(sliding, CacheContents(4096, 2, PiKVConfig()), 4).total == whole
    assert part_bytes(sliding, CacheContents(4096, 2, PiKVConfig()), 4, processes=False).total == whole / 4


def test_part_errors_compare_with_the_mean_and_the_fullest_part():
    part = part_bytes(MODEL, CacheContents(50_000, 2, PiKVConfig()), 2).total
    error, above = part_errors([int(0.9 * part), int(1.1 * part)], MODEL, 50_000, 2, PiKVConfig())
    assert (error, above) == (pytest.approx(0, abs=1e-6), pytest.approx(0.1, abs=1e-6))
    with pytest.raises(ValueError, match="got none"):
        part_errors([], MODEL, 1, 1, PiKVConfig())


def test_a_budget_bounds_what_is_stored():
    whole = cache_bytes(MODEL, CacheContents(65_536, 2, PiKVConfig())).total
    assert cache_bytes(MODEL, CacheContents(65_536, 2, PiKVConfig(budget=0.25))).total == pytest.approx(
        whole / 4, rel=0.02
    )
    assert cache_bytes(MODEL, CacheContents(65_536, 2, PiKVConfig(budget=8192))).total == pytest.approx(
        whole / 8, rel=0.03
    )
    limit = 100 * 2**20
    assert (
        0.95 * limit < cache_bytes(MODEL, CacheContents(65_536, 2, PiKVConfig(budget=str(limit) + "B"))).total <= limit
    )


def test_codes_take_what_the_store_keeps_of_them():
    model, shape = small_model("qwen3_moe, 4 x 128")
    cache = filled(model, shape, 4096, 1, key_codec="int8", value_codec="int2")
    (pool,) = cache.layers[0].table.pools.packed.values()
    assert (
        packed_page_bytes(shape.layers[0], PiKVConfig(key_codec="int8", value_codec="int2"), "float32")
        == pool.page_bytes
    )


# Time


def test_costs_follow_their_formulas():
    device = Device("x", 1, 100.0, 1000.0, 0.5, 10.0, 0.0, 1.0, 1.0)
    assert attention_seconds(50, 100, device) == 0.5
    assert attention_seconds(50, 2000, device) == 2.0
    assert collective_seconds(20, 1, device) == 0
    assert collective_seconds(20, 4, device) == 3 * (0.5 + 2)
    assert result_bytes(LAYER, 2) == 4 * (2 * 32 * 129 + 8)
    with pytest.raises(ValueError, match="got -1 and 0"):
        attention_seconds(-1, 0, device)
    with pytest.raises(ValueError, match="got 0 and 1"):
        collective_seconds(1, 0, device)


def test_what_is_sent_does_not_depend_on_the_context():
    assert sent_bytes(MODEL, 3, 1) == 0
    assert sent_bytes(MODEL, 3, 4) == 3 * 8 * result_bytes(LAYER, 3)
    assert sent_bytes(MODEL, 3, 4, "devices") == 3 / 4 * 8 * (result_bytes(LAYER, 3) + 3 * 32 * 128 * 2)
    rows = lay_out(Workload(MODEL, 4096, 2, GPU, 4)).rows
    longer = lay_out(Workload(MODEL, 65_536, 2, GPU, 4)).rows
    assert [row.sent_bytes for row in rows] == [row.sent_bytes for row in longer]
    assert [row.step.exchange for row in rows] == [row.step.exchange for row in longer]


SIZES = st.tuples(st.integers(1, 1 << 18), st.integers(1, 64), st.integers(1, 64))
OPTIONS = st.sampled_from(
    [
        PiKVConfig(),
        PiKVConfig(key_codec="int4", value_codec="int8"),
        PiKVConfig(routing="page_bound"),
        PiKVConfig(key_codec="lowrank", value_codec="none", routing="adaptive", max_pages=0.1),
    ]
)


@given(SIZES, OPTIONS, st.sampled_from(["processes", "devices"]), st.sampled_from(sorted(DEVICES)))
@settings(max_examples=40, deadline=None)
def test_more_work_takes_more_time_and_more_devices_less_attention(sizes, options, mode, name):
    tokens, batch, devices = sizes
    device = DEVICES[name]
    here = step_time(MODEL, CacheContents(tokens, batch, options), device, devices, mode)
    # A page's worth: the window takes up to one more or less.
    longer = step_time(MODEL, CacheContents(tokens + 1024, batch, options), device, devices, mode)
    wider = step_time(MODEL, CacheContents(tokens, batch + 1, options), device, devices, mode)
    alone = step_time(MODEL, CacheContents(tokens, batch, options), device)
    assert 0 < here.total <= longer.total
    assert here.total < wider.total
    assert here.attention <= alone.attention * (1 + 1e-9)
    assert here.weights == alone.weights
    if devices > 1:
        assert here.exchange > 0
        assert here.overhead > alone.overhead


@given(st.integers(1, 64), st.sampled_from([2, 4, 8, 16]), st.sampled_from(["H200", "RTX4090", "A100-40GB"]))
@settings(max_examples=15, deadline=None)
def test_sharding_saves_time_from_the_crossover_on(batch, devices, name):
    options, device = PiKVConfig(), DEVICES[name]
    tokens = crossover(MODEL, CacheContents(0, batch, options), device, devices)
    assert tokens is not None
    times = {
        (at, n): step_time(MODEL, CacheContents(at, batch, options), device, n).total
        for at in (tokens + 512, max(1, tokens - 512))
        for n in (1, devices)
    }  # fmt: skip
    assert times[tokens + 512, devices] < times[tokens + 512, 1]
    if tokens > 512:
        assert times[tokens - 512, devices] > times[tokens - 512, 1]


def test_where_little_is_read_sharding_never_saves_time():
    assert (
        crossover(MODEL, CacheContents(0, 1, PiKVConfig(routing="page_bound", max_pages=4)), GPU, 4, limit=1 << 17)
        is None
    )
    assert crossover(MODEL, CacheContents(0, 1, PiKVConfig()), GPU, 1) is None


def test_a_calibrated_cpu_is_measured():
    device = calibrated_cpu(buffer_bytes=4 << 20, repeats=1)
    assert device.name == "cpu"
    assert device.memory > 2**30
    assert 1e8 < device.bandwidth < 1e12
    assert 1e-5 < device.overhead < 1
    assert set(DEVICES["cpu"].rates.codes) == set(device.rates.codes)
    with pytest.raises(ValueError, match="got 0 and"):
        calibrated_cpu(repeats=0)
