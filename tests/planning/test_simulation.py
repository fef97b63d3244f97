"""Simulated devices against slow loops over tokens, and what may never happen to them."""

import dataclasses
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pikv_hf.planning.hardware import find_device
from pikv_hf.planning.model_shape import LayerShape, ModelShape
from pikv_hf.planning.simulate.outcome import Outcome, SimulationOptions
from pikv_hf.planning.simulate.placements import (
    PLACEMENTS,
    BalancedPlaced,
    devices_per_expert,
    level,
    make_placed,
    original_shards,
    routes,
    shared_bits,
    top_share,
)
from pikv_hf.planning.simulate.routing_trace import Popularity, RoutingTrace, synthetic_trace
from pikv_hf.planning.simulate.simulation import simulate
from pikv_hf.sharding import shard_map
from pikv_hf.sharding.load_balancing import imbalance
from pikv_hf.sharding.placement import expert_placement, hash_placement
from pikv_hf.sharding.shard_map import ShardMap

EXPERTS, LAYERS = 8, 3
OPTIONS = SimulationOptions(context=700, page_size=4, recent_window=16, sink_tokens=3, check_every=100)
LAYER = LayerShape(kv_heads=2, query_heads=6, key_dim=16, value_dim=8, experts=EXPERTS, top_k=2)
SHAPE = ModelShape("small", (LAYER,) * LAYERS, params=1, routed_params=0, unread_params=0)
TRACE = synthetic_trace(LAYERS, EXPERTS, 700, Popularity(skew=1.0, stickiness=0.3), seed=2)
H200 = find_device("H200")


def outcome_of(placement: str, devices: int, trace: RoutingTrace = TRACE, **changes: Any) -> Outcome:
    options = dataclasses.replace(OPTIONS, **changes)
    (outcome,) = simulate(trace, SHAPE, H200, options, [placement], [devices]).outcomes
    return outcome


class SlowLayer:
    """One layer, token by token: which tokens each device holds, as a list per expert."""

    def __init__(self, placement: str, devices: int) -> None:
        self.placement, self.devices = placement, devices
        self.held: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.moved = self.replans = 0
        self.plan = routes(np.ones(EXPERTS), devices, OPTIONS.bound)
        self.map = ShardMap(EXPERTS, [1.0] * devices, OPTIONS.page_size, whole=False)
        self.came: list[int] = []

    def device_of(self, position: int, expert: int) -> int:
        one = torch.tensor([position]), torch.tensor([expert])
        if self.placement == "expert":
            return int(expert_placement(EXPERTS, self.devices, 0)(*one))
        if self.placement == "hash":
            return int(hash_placement(OPTIONS.page_size, self.devices)(*one))
        if self.placement == "divided":
            return next(part for part in range(self.devices) if self.is_of(part, position, expert))
        if self.placement == "original":
            return ((position % self.devices) ^ (expert % self.devices)) % self.devices
        first, count, device = self.plan
        return int(device[first[expert] + position // OPTIONS.page_size % count[expert]])

    def add(self, position: int, expert: int) -> None:
        self.held[expert, self.device_of(position, expert)].append(position)

    def is_of(self, part: int, position: int, expert: int) -> bool:
        one = np.array([expert]), np.array([position])
        own = bool(self.map.own(*one, part)[0] >= 0)
        if own:
            # Counted together, as they come together: what came last counts most.
            self.came += self.map.own(*one, -1).tolist()
        return own

    def loads(self) -> list[int]:
        loads = [0] * self.devices
        for (_, device), positions in self.held.items():
            loads[device] += len(positions)
        return loads

    def settle(self) -> None:
        if self.placement == "divided":
            self.map.note(np.array(self.came), -1)
            self.came = []
            self.replans += self.map.divide_if_skewed()
            return
        loads, page = self.loads(), OPTIONS.page_size
        mean = sum(loads) / self.devices
        if self.placement != "balanced" or max(loads) <= (1 + OPTIONS.bound) * mean + page:
            return
        self.replans += 1
        counts: Counter[int] = Counter()
        for (expert, _), positions in self.held.items():
            counts[expert] += len(positions)
        self.plan = routes([counts[expert] for expert in range(EXPERTS)], self.devices, OPTIONS.bound)
        receivers = sorted(
            (d for d in range(self.devices) if loads[d] < mean), key=lambda d: (-rooms(mean, loads, d), d)
        )
        donors = [d for d in range(self.devices) if spares(mean, loads, d) > 0]
        for donor in sorted(donors, key=lambda d: (-spares(mean, loads, d), d)):
            self.give(donor, receivers, mean, loads)

    def give(self, donor: int, receivers: list[int], mean: float, loads: list[int]) -> None:
        page, spare = OPTIONS.page_size, spares(mean, loads, donor)
        pages = {expert: len(self.held[expert, donor]) // page for expert in range(EXPERTS)}
        for expert in sorted(pages, key=lambda e: (-pages[e], e)):
            for _ in range(min(pages[expert], spare)):
                if not receivers:
                    return
                own = self.held[expert, donor]
                self.held[expert, receivers[0]] += own[:page]
                self.held[expert, donor] = own[page:]
                self.moved += 1
                loads[receivers[0]] += page
                if loads[receivers[0]] >= mean:
                    receivers.pop(0)
            spare -= min(pages[expert], spare)


def spares(mean: float, loads: list[int], device: int) -> int:
    return max(0, int((loads[device] - mean) // OPTIONS.page_size))


def rooms(mean: float, loads: list[int], device: int) -> int:
    return -int((loads[device] - mean) // OPTIONS.page_size)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("devices", [1, 3, 4, 16])
def test_as_a_loop_over_tokens(placement: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that these few tokens are enough to divide shards anew.
    monkeypatch.setattr(shard_map, "MIN_PAGES", 1)
    layers = [SlowLayer(placement, devices) for _ in range(LAYERS)]
    sinks, page = 4, OPTIONS.page_size
    over_time, stored = [], 0
    for context in [100, 200, 300, 400, 500, 600, 700]:
        # The oldest page leaves the window when as many tokens and a page more have come.
        while context - sinks - stored >= OPTIONS.recent_window + page:
            for layer, experts in zip(layers, TRACE.experts, strict=True):
                for position in range(sinks + stored, sinks + stored + page):
                    layer.add(position, int(experts[position]))
            stored += page
        for layer in layers:
            layer.settle()
        width = 2 * (16 + 8) * 2
        held = [
            width * sum(-(-layer.loads()[device] // page) * page + context - stored for layer in layers)
            for device in range(devices)
        ]
        over_time.append(max(held) * devices / sum(held))
    outcome = outcome_of(placement, devices)
    assert outcome.bytes_max == max(held)
    assert outcome.bytes_mean == pytest.approx(sum(held) / devices, abs=1)
    assert outcome.balance_over_time == pytest.approx(over_time)
    assert outcome.layer_balance == pytest.approx(np.mean([imbalance(layer.loads()) for layer in layers]))
    assert outcome.holders == sum(any(layer.loads()[device] for layer in layers) for device in range(devices))
    assert (outcome.moved_pages, outcome.replans) == (sum(x.moved for x in layers), sum(x.replans for x in layers))
    shares = [
        max((len(layer.held[expert, device]) for device in range(devices)), default=0)
        for layer in layers
        for expert in range(EXPERTS)
    ]
    assert outcome.top_share == pytest.approx(sum(shares) / (stored * LAYERS))


def test_bytes_and_seconds() -> None:
    outcome = outcome_of("hash", 4, batch=5)
    # 680 tokens in 170 pages; 16 tokens and 4 sinks stay.
    assert outcome.bytes_max == (43 * 4 + 20) * 2 * 24 * 2 * LAYERS * 5
    assert outcome.sent_bytes == 4 * (5 * 6 * (8 + 1) + 8)
    assert outcome.received_bytes == 3 * outcome.sent_bytes
    block = outcome.sent_bytes
    assert outcome.merge_seconds == pytest.approx(LAYERS * 3 * (H200.link_latency + block / H200.link_bandwidth))
    # Pages 1 to 170: the first device has 42 of them, and attends to the window.
    read = (42 * 4 + 20) * 2 * 24 * 2 * 5
    assert outcome.attention_seconds == pytest.approx(LAYERS * read / (H200.bandwidth * H200.attained_bandwidth))


def test_one_device_is_the_dense_cache() -> None:
    simulation = simulate(TRACE, SHAPE, H200, OPTIONS, counts=[1])
    for outcome in simulation.outcomes:
        assert outcome.bytes_max == simulation.total_bytes
        assert outcome.attention_seconds == pytest.approx(simulation.dense_seconds)
        assert outcome.received_bytes == outcome.sent_bytes == outcome.merge_seconds == 0
        assert (outcome.balance, outcome.moved_pages, outcome.holders) == (1.0, 0, 1)


def test_traffic_does_not_depend_on_the_context() -> None:
    short, long = (outcome_of("expert", 4, context=context) for context in (200, 700))
    assert short.sent_bytes == long.sent_bytes
    assert short.received_bytes == long.received_bytes


def test_few_experts_leave_devices_empty_unless_hot_ones_are_split() -> None:
    trace = synthetic_trace(LAYERS, EXPERTS, 4000, Popularity(skew=0.5), seed=1)
    plain, split = (outcome_of(name, 32, trace, context=4000) for name in ("expert", "balanced"))
    assert plain.holders == EXPERTS
    assert split.holders == 32
    assert split.balance < 1.1 < plain.balance


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("devices", [4, 6, 16])
def test_balanced_stays_within_its_bound_and_a_page(skew: float, devices: int) -> None:
    trace = synthetic_trace(2, EXPERTS, 6000, Popularity(skew=skew, topic_tokens=2000), seed=3)
    placed = BalancedPlaced(2, EXPERTS, devices, page_size=4, bound=0.1)
    for start in range(0, 6000, 500):
        positions = np.arange(start, start + 500)
        placed.add(positions, trace.experts[:, positions].astype(np.int64))
        placed.settle()
        loads = placed.stock.sum(axis=1)
        assert (placed.stock >= 0).all()
        assert (loads.sum(axis=1) == start + 500).all()
        np.testing.assert_array_equal(placed.stock.sum(axis=2), trace.resized(start + 500).loads())
        # What cannot move are pages that are not full, at most one of each expert.
        assert (loads.max(axis=1) <= 1.1 * loads.mean(axis=1) + 4 * EXPERTS).all()
    assert (loads.max(axis=1) <= 1.1 * loads.mean(axis=1) + 4).all()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(1, 8))
def test_levelling_moves_whole_pages_down_to_the_mean(rows: list[list[int]], page_size: int) -> None:
    before = np.array(rows)
    after = before.copy()
    moved = level(after, page_size)
    assert (after >= 0).all()
    np.testing.assert_array_equal(after.sum(axis=1), before.sum(axis=1))
    assert ((after - before) % page_size == 0).all()
    assert np.abs(after - before).sum() == 2 * moved * page_size
    loads, mean = after.sum(axis=0), after.sum() / 3
    full = after // page_size
    for device in range(3):
        if loads[device] >= mean + page_size:
            # It gives what it may: nothing is left of it that is full.
            assert full[:, device].sum() == 0
        # Nobody who was below the mean comes to lie a page above it.
        if before.sum(axis=0)[device] <= mean:
            assert loads[device] < mean + page_size
    assert level(after.copy(), page_size) == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(1, 24))
def test_routes_give_every_expert_places(loads: list[int], devices: int) -> None:
    first, count, device = routes(loads, devices, 0.1)
    assert (count >= 1).all()
    assert count.sum() == len(device) >= devices
    np.testing.assert_array_equal(first, np.cumsum(count) - count)
    assert 0 <= device.min() <= device.max() < devices


@pytest.mark.parametrize("devices", [2, 4, 8, 64])
def test_the_original_spreads_each_expert_evenly_over_powers_of_two(devices: int) -> None:
    positions = np.arange(4 * devices)
    for expert in range(10):
        places = original_shards(positions, np.full_like(positions, expert), devices)
        assert (np.bincount(places, minlength=devices) == 4).all()


def test_the_original_folded_is_uneven_otherwise() -> None:
    positions = np.arange(3 * 1000)
    loads = sum(
        np.bincount(original_shards(positions, np.full_like(positions, expert), 3), minlength=3) for expert in range(3)
    )
    # Of the nine pairs of residues, three have exclusive or 0, two 1, two 2 and two 3, which is folded onto 0.
    assert np.asarray(loads).tolist() == [5000, 2000, 2000]


def test_token_groups_are_the_devices_of_an_expert() -> None:
    positions = np.arange(640)
    for groups in (1, 2, 4, 16):
        places = {int(place) for place in original_shards(positions, np.full_like(positions, 5), 16, groups)}
        assert len(places) == groups


def test_locality_figures() -> None:
    apart, mixed = np.diag([4, 4]), np.full((2, 2), 2)
    assert (top_share(apart), devices_per_expert(apart), shared_bits(apart)) == (1.0, 1.0, 1.0)
    assert (top_share(mixed), devices_per_expert(mixed), shared_bits(mixed)) == (0.5, 2.0, 0.0)
    empty = np.zeros((2, 2), int)
    assert (top_share(empty), devices_per_expert(empty), shared_bits(empty)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placements": ["balancd"]}, "unknown placement 'balancd'.*balanced"),
        ({"counts": [4, 0]}, r"at least 1, got \(4, 0\)"),
        ({"counts": []}, r"at least 1, got \(\)"),
        ({"trace": synthetic_trace(1, 4, 10)}, r"the trace has 4 experts, small \[8\]"),
        (
            {"shape": dataclasses.replace(SHAPE, layers=(dataclasses.replace(LAYER, sliding=10),))},
            "small has no layer that keeps all tokens",
        ),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    given = {"trace": TRACE, "shape": SHAPE, "device": H200, "options": OPTIONS, **change}
    with pytest.raises(ValueError, match=message):
        simulate(**given)


@pytest.mark.parametrize(("name", "value"), [("context", 0), ("page_size", 0), ("bound", -0.1), ("check_every", 0)])
def test_wrong_options(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} has to be at least .*, got {value}"):
        SimulationOptions(**{name: value})


def test_an_unknown_placement_by_itself() -> None:
    with pytest.raises(ValueError, match="unknown placement 'none'"):
        make_placed("none", 1, 1, 1, 1)
