"""Plans: what is recommended where a model fits, where it does not, and what would fit."""

import dataclasses

import pytest
from planned_models import GPU, MODEL, bundled

from pikv_hf import PiKVConfig
from pikv_hf.planning.hardware import DEVICES, parse_devices
from pikv_hf.planning.plan import Workload, kv_bytes, lay_out
from pikv_hf.planning.recommend import Plan, make_plan

pytestmark = pytest.mark.slow


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
