"""Plans: shapes of models, capacity of shards, predicted bytes against real caches, times and what is recommended."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from pikv_hf import PiKVConfig
from pikv_hf.eval.bench.decode import _decode_inputs, _our_step, filled_pikv, geometry_model
from pikv_hf.eval.cli.plan_command import MODEL_CONFIGS
from pikv_hf.eval.studies.planning.plan_validation_memory import (
    filled,
    memory_cells,
    part_cells,
    part_errors,
    small_model,
)
from pikv_hf.planning.cache_memory import cache_bytes, packed_page_bytes, part_bytes
from pikv_hf.planning.calibration import calibrated_cpu
from pikv_hf.planning.capacity import expected_pages, measured_loads, shard_capacity, uniform_loads
from pikv_hf.planning.hardware import DEVICES, Device, find_device, parse_devices
from pikv_hf.planning.model_shape import LayerShape, ModelShape, expected_experts, load_config, shape_of
from pikv_hf.planning.plan import Workload, kv_bytes, lay_out
from pikv_hf.planning.recommend import Plan, make_plan
from pikv_hf.planning.step_time import (
    attention_seconds,
    collective_seconds,
    crossover,
    result_bytes,
    sent_bytes,
    step_time,
)
from pikv_hf.sharding.placement import expert_placement

# Parameters, layers, paged ones, KV heads, dims of keys and values.
BUNDLED = {
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, 48, 48, 4, 128, 128),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, 32, 32, 8, 128, 128),
    "allenai/OLMoE-1B-7B-0924": (6_919_161_856, 16, 16, 16, 128, 128),
    "openai/gpt-oss-20b": (20_914_757_184, 24, 12, 8, 64, 64),
    "openai/gpt-oss-120b": (116_829_156_672, 36, 18, 8, 64, 64),
    "deepseek-ai/DeepSeek-V2-Lite": (15_706_484_224, 27, 27, 16, 192, 128),
}
LAYER = LayerShape(kv_heads=4, query_heads=32, key_dim=128, value_dim=128, experts=64, top_k=4, expert_params=10**6)
MODEL = ModelShape("test", (LAYER,) * 8, 10**9, 64 * 8 * 10**6, 10**8)
GPU = DEVICES["H100"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bundled(name: str) -> ModelShape:
    return shape_of(load_config(name, MODEL_CONFIGS), name)


# Models


def test_every_bundled_config_is_tested():
    stems = {name.rpartition("/")[2] for name in BUNDLED}
    assert stems == {path.stem for path in MODEL_CONFIGS.iterdir()}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_have_their_parameters_and_heads(name):
    shape = bundled(name)
    params, layers, paged, heads, keys, values = BUNDLED[name]
    assert shape.params == params
    assert (len(shape.layers), len(shape.paged_layers)) == (layers, paged)
    assert {(x.kv_heads, x.key_dim, x.value_dim) for x in shape.layers} == {(heads, keys, values)}
    assert shape.routed_params == sum(x.experts * x.expert_params for x in shape.layers)


@pytest.mark.parametrize(
    ("name", "billions", "with_embedding"),
    [
        ("Qwen3-30B-A3B", 3.3, True),
        ("Mixtral-8x7B-v0.1", 12.9, True),
        ("OLMoE-1B-7B-0924", 1.3, True),
        ("gpt-oss-20b", 3.6, False),
        ("gpt-oss-120b", 5.1, False),
        ("DeepSeek-V2-Lite", 2.4, False),
    ],
)
def test_active_parameters_are_those_that_model_cards_state(name, billions, with_embedding):
    shape = bundled(name)
    active = shape.active_params() + (shape.unread_params if with_embedding else 0)
    assert active / 1e9 == pytest.approx(billions, abs=0.06)


def test_mxfp4_experts_are_counted_as_they_are_stored():
    # The checkpoint of gpt-oss-120b has 60.8 GiB.
    assert bundled("gpt-oss-120b").weight_bytes / 2**30 == pytest.approx(60.8, rel=0.01)
    config = load_config("gpt-oss-120b", MODEL_CONFIGS)
    assert shape_of(config, "whole", weights="bfloat16").weight_bytes == 2 * BUNDLED["openai/gpt-oss-120b"][0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_shapes_are_those_of_the_cache_that_the_model_fills(family):
    model = FAMILIES[family].build()
    shape = shape_of(model.config, family, dtype="float32")
    cache = DynamicCache(config=model.config)
    model(torch.randint(2, 99, (1, 40)), past_key_values=cache)
    for layer, expected in zip(cache.layers, shape.layers, strict=True):
        assert (layer.keys.shape[1], layer.keys.shape[3]) == (expected.kv_heads, expected.key_dim)
        assert layer.values.shape[3] == expected.value_dim
        assert layer.keys.shape[2] == min(40, expected.sliding or 40)
    assert shape.params == sum(parameter.numel() for parameter in model.parameters())
    assert any(layer.experts for layer in shape.layers) == FAMILIES[family].routed
    assert all(0 < layer.top_k < layer.experts for layer in shape.layers if layer.experts)


def test_expected_experts_are_those_of_random_choices():
    generator = np.random.default_rng(0)
    for experts, top_k, tokens in ((64, 8, 1), (64, 8, 5), (8, 2, 3)):
        chosen = [
            len(np.unique([generator.permutation(experts)[:top_k] for _ in range(tokens)])) for _ in range(2000)
        ]  # fmt: skip
        assert expected_experts(experts, top_k, tokens) == pytest.approx(np.mean(chosen), rel=0.02)
    assert expected_experts(0, 0, 4) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen3-30B-A3", r"'Qwen3-30B-A3'.*did you mean 'Qwen3-30B-A3B'"),
        (str(MODEL_CONFIGS), r"folder '.*model_configs' has no config.json"),
        (__file__, r"test_planning.py' is no config"),
    ],
)
def test_models_without_a_config_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_config(name, MODEL_CONFIGS)


def test_without_network_the_error_says_what_there_is(monkeypatch):
    def offline(name: str) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    with pytest.raises(ValueError, match=r"'some/model'.*gpt-oss-20b.*no connection"):
        load_config("some/model", MODEL_CONFIGS)


def test_unknown_dtypes_name_the_known_ones():
    config = load_config("OLMoE-1B-7B-0924", MODEL_CONFIGS)
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got 'int4'"):
        shape_of(config, "x", dtype="int4")
    with pytest.raises(ValueError, match="mxfp4, got 'int3'"):
        shape_of(config, "x", weights="int3")


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


def test_bounds_for_routing_are_counted():
    torch.manual_seed(0)
    model = geometry_model()
    keys = torch.randn(1, 4, 6000, 128)
    storage = {"routing": "page_bound", "max_pages": 8, "page_size": 16}
    cache = filled_pikv(model, keys, keys, **storage)
    with torch.no_grad():
        _our_step(cache, model.model.layers[0].self_attn, *_decode_inputs(1))
    shape = shape_of(model.config, "layer", dtype="float32")
    for changed, matters in ((storage, False), ({"page_size": 16}, True)):
        predicted = cache_bytes(shape, 6001, 1, PiKVConfig.from_dict(changed), generated=1).total
        assert abs(predicted / cache.nbytes - 1) > 0.04 if matters else abs(predicted / cache.nbytes - 1) < 0.02


def test_parts_have_the_window_and_an_equal_share():
    options = PiKVConfig()
    whole = cache_bytes(MODEL, 50_000, 2, options)
    assert part_bytes(MODEL, 50_000, 2, options, 1) == whole
    part = part_bytes(MODEL, 50_000, 2, options, 4)
    assert part.window == whole.window
    assert part.shards == pytest.approx(whole.shards / 4, rel=0.01)
    fullest = part_bytes(MODEL, 50_000, 2, options, 4, imbalance=0.1)
    assert fullest.shards == pytest.approx(1.1 * part.shards, rel=0.01)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        part_bytes(MODEL, 50_000, 2, options, 0)


def test_predicted_bytes_of_parts_are_within_two_percent_of_a_divided_cache():
    torch.manual_seed(0)
    (cell,) = part_cells(["qwen3_moe, 4 x 128"], ["none"], [(4096, 1, 4)])
    assert abs(cell.error) < 0.02
    assert 0 <= cell.fullest < 0.1


def test_sliding_layers_are_of_every_process_and_divided_over_devices():
    sliding = dataclasses.replace(MODEL, layers=(dataclasses.replace(LAYER, sliding=127),) * 8)
    whole = cache_bytes(sliding, 4096, 2, PiKVConfig()).total
    assert whole == 8 * 2 * 127 * LAYER.width * 2
    assert part_bytes(sliding, 4096, 2, PiKVConfig(), 4).total == whole
    assert part_bytes(sliding, 4096, 2, PiKVConfig(), 4, processes=False).total == whole / 4


def test_part_errors_compare_with_the_mean_and_the_fullest_part():
    part = part_bytes(MODEL, 50_000, 2, PiKVConfig(), 2).total
    error, above = part_errors([int(0.9 * part), int(1.1 * part)], MODEL, 50_000, 2, PiKVConfig())
    assert (error, above) == (pytest.approx(0, abs=1e-6), pytest.approx(0.1, abs=1e-6))
    with pytest.raises(ValueError, match="got none"):
        part_errors([], MODEL, 1, 1, PiKVConfig())


def test_a_budget_bounds_what_is_stored():
    whole = cache_bytes(MODEL, 65_536, 2, PiKVConfig()).total
    assert cache_bytes(MODEL, 65_536, 2, PiKVConfig(budget=0.25)).total == pytest.approx(whole / 4, rel=0.02)
    assert cache_bytes(MODEL, 65_536, 2, PiKVConfig(budget=8192)).total == pytest.approx(whole / 8, rel=0.03)
    limit = 100 * 2**20
    assert 0.95 * limit < cache_bytes(MODEL, 65_536, 2, PiKVConfig(budget=str(limit) + "B")).total <= limit


def test_codes_take_what_the_store_keeps_of_them():
    model, shape = small_model("qwen3_moe, 4 x 128")
    cache = filled(model, shape, 4096, 1, key_codec="int8", value_codec="int2")
    (pool,) = cache.layers[0].table.pages.sealed.values()
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
    here = step_time(MODEL, tokens, batch, options, device, devices, mode)
    # A page's worth: the window takes up to one more or less.
    longer = step_time(MODEL, tokens + 1024, batch, options, device, devices, mode)
    wider = step_time(MODEL, tokens, batch + 1, options, device, devices, mode)
    alone = step_time(MODEL, tokens, batch, options, device)
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
    tokens = crossover(MODEL, batch, options, device, devices)
    assert tokens is not None
    times = {
        (at, n): step_time(MODEL, at, batch, options, device, n).total
        for at in (tokens + 512, max(1, tokens - 512))
        for n in (1, devices)
    }  # fmt: skip
    assert times[tokens + 512, devices] < times[tokens + 512, 1]
    if tokens > 512:
        assert times[tokens - 512, devices] > times[tokens - 512, 1]


def test_where_little_is_read_sharding_never_saves_time():
    assert crossover(MODEL, 1, PiKVConfig(routing="page_bound", max_pages=4), GPU, 4, limit=1 << 17) is None
    assert crossover(MODEL, 1, PiKVConfig(), GPU, 1) is None


def test_a_calibrated_cpu_is_measured():
    device = calibrated_cpu(buffer_bytes=4 << 20, repeats=1)
    assert device.name == "cpu"
    assert device.memory > 2**30
    assert 1e8 < device.bandwidth < 1e12
    assert 1e-5 < device.overhead < 1
    assert set(DEVICES["cpu"].rates.codes) == set(device.rates.codes)
    with pytest.raises(ValueError, match="got 0 and"):
        calibrated_cpu(repeats=0)


# Plans


def plan(tokens: int, batch: int, devices: str, model: str = "Qwen3-30B-A3B", **options: object) -> Plan:
    count, device = parse_devices(devices)
    return make_plan(Workload(bundled(model), tokens, batch, device, count, PiKVConfig.from_dict(options)))


def test_one_device_is_enough_where_it_is():
    made = plan(32_768, 1, "8xH200")
    assert made.recommendation.startswith("One H200 is enough: no codec, no routing;")
    assert made.row is not None
    assert made.row.devices == 1


def test_exact_sharding_comes_before_a_codec():
    made = plan(131_072, 8, "8xH200")
    assert made.recommendation.startswith("Shard over 2 H200, a process each: no codec, no routing;")
    assert any(note.startswith("If the 8 sequences need not be one batch") for note in made.notes)
    assert any("40,960 positions" in note for note in made.notes)


def test_a_codec_is_recommended_where_nothing_fits_without():
    made = plan(131_072, 8, "1xH200")
    assert made.recommendation.startswith("One H200 is enough: int8, no routing;")
    assert "without the codec one device would lack 41.0 GiB" in made.recommendation
    assert not made.layout.rows[0].fits
    assert made.chosen.workload.options.key_codec == "int8"


def test_weights_that_fit_no_device_are_divided_over_one_process():
    made = plan(8192, 1, "4xA100-40GB")
    assert made.row is not None
    assert (made.row.mode, made.row.devices) == ("devices", 2)
    assert "one process over 2 A100-40GB" in made.recommendation
    assert made.row.weight_bytes == -(-made.layout.workload.model.weight_bytes // 2)


def test_where_nothing_helps_the_plan_says_what_would_fit():
    made = plan(1 << 20, 8, "2xH100")
    assert made.row is None
    most = made.chosen.rows[-1]
    assert f"a context of {most.max_context:,} at batch 8" in made.recommendation
    tiny = plan(1024, 1, "1xRTX4090")
    assert "weights alone take 56.9 GiB" in tiny.recommendation
    assert tiny.to_dict()["recommended"] is None


def test_what_was_asked_for_is_kept():
    made = plan(131_072, 8, "8xH200", key_codec="int2", value_codec="int4", routing="page_bound", budget=0.5)
    assert made.chosen is made.layout
    assert "int2/int4, page_bound:64, a budget of 50% of the tokens" in made.recommendation
    fixed = make_plan(dataclasses.replace(plan(131_072, 8, "1xH200").layout.workload), fixed_codec=True)
    assert fixed.row is None


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_longest_context_and_largest_batch_are_the_last_that_fit(devices):
    workload = Workload(bundled("Mixtral-8x7B-v0.1"), 16_384, 4, DEVICES["H200"], 4)
    row = lay_out(workload).row(devices)

    def fits(tokens: int, batch: int) -> bool:
        return row.weight_bytes + kv_bytes(workload, tokens, batch, devices, row.mode).total <= row.usable

    assert fits(row.max_context, 4)
    assert not fits(row.max_context + 32, 4)
    assert fits(16_384, row.max_batch)
    assert not fits(16_384, row.max_batch + 1)


def test_rows_are_powers_of_two_and_all_devices():
    assert [row.devices for row in lay_out(Workload(MODEL, 1024, 1, GPU, 6)).rows] == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        Workload(MODEL, 0, 1, GPU)


def test_configs_are_small_files():
    assert all(path.stat().st_size < 4096 for path in Path(MODEL_CONFIGS).iterdir())
