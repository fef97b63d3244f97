"""Shards on several devices of one process: the same tokens, within the same budgets, as on one."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, prompts
from press_runs import PRESSES, held_by, ids_of, next_logits, padded, read
from test_device_machine import no_memory_for
from test_exact import assert_same, generate, reference
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.config import CODECS, ROUTINGS, SCHEDULERS
from pikv_hf.distributed.device_layout import Place, find_devices
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.scheduling.growth_limit import BudgetError

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 4}
#: Of families whose layers differ from one to the next.
LAYERED = ("gpt_oss", "llama4")


def cpus(number: int) -> list[str]:
    return [f"cpu:{index}" for index in range(number)]


@functools.cache
def shared_model(family: str = "qwen3_moe") -> Any:
    """Return a model of two layers, if its layers are alike, that tests leave as it is."""
    return FAMILIES[family].build(**({} if family in LAYERED else {"num_hidden_layers": 2}))


@functools.cache
def single_layer() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=1)


def spread(model: Any, devices: int | list[str], family: str = "qwen3_moe", **options: Any) -> PiKVCache:
    placement = "expert" if FAMILIES[family].routed else "hash"
    names = cpus(devices) if isinstance(devices, int) else devices
    return PiKVCache.for_model(model, devices=names, **{**SMALL, "placement": placement, **options})


def paged_layers(cache: PiKVCache) -> list[PiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]


def assert_spread(cache: PiKVCache) -> None:
    """All devices have a part of the shards, and every token is in one of them."""
    for layer in paged_layers(cache):
        layer.settle()
        held = sum(table.held(layer.seen).long() for table in layer.tables())
        assert torch.equal(held.view(layer.batch, layer.lanes, -1).expand(-1, layer.heads, -1), layer.held().long())
        # Heads that keep different tokens have more pages than devices have.
        assert len({id(table.pool) for table in layer.tables()}) == layer.layout.parts


# Exact


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_greedy_with_left_padding(family: str) -> None:
    model, number = shared_model(family), 2 + list(FAMILIES).index(family) % 3
    expected = reference(model, prompts(), max_new_tokens=10)
    cache = spread(model, number, family)
    assert_same(generate(model, prompts(), cache, max_new_tokens=10), expected)
    assert_spread(cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_one_more_way(family: str) -> None:
    """Each family another decoding strategy; beams, sampling, chunks and drafts come several times over."""
    model, number = shared_model(family), list(FAMILIES).index(family)
    ways: list[dict[str, Any]] = [
        {"num_beams": 3, "num_return_sequences": 2, "output_logits": False},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
        {"prefill_chunk_size": 13},
        {"prompt_lookup_num_tokens": 4, "eos_token_id": 198, "output_logits": False},
    ]
    way = {"max_new_tokens": 10, **ways[number % len(ways)]}
    if family == "llama4" and "prefill_chunk_size" in way:
        # Prompted in chunks, transformers' own eager and sdpa attention disagree on Llama-4.
        way = {"max_new_tokens": 10, **ways[0]}
    inputs = prompts()
    if "prompt_lookup_num_tokens" in way:
        ids = torch.randint(2, 190, (1, 20), generator=torch.Generator().manual_seed(3)).repeat(1, 4)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = {name: value for name, value in way.items() if name != "prompt_lookup_num_tokens"}
    expected = reference(model, inputs, **plain)
    ours = generate(model, inputs, spread(model, 2 + number % 2, family, sliding_layers="paged"), **way)
    assert torch.equal(ours.sequences, expected.sequences)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("placement", ["expert", "balanced", "hash"])
def test_every_number_of_devices(devices: int, placement: str) -> None:
    """More than shards and experts too."""
    model = shared_model()
    expected = reference(model, prompts(length=120), max_new_tokens=12)
    cache = spread(model, devices, placement=placement)
    assert_same(generate(model, prompts(length=120), cache, max_new_tokens=12), expected)
    assert_spread(cache)
    assert list(cache.memory_report().per_device) == cpus(devices)


@pytest.mark.parametrize(
    "options", [{"page_size": 4, "num_shards": 1}, {"recent_window": 0}, {"sink_tokens": 0}], ids=str
)
def test_layouts(options: dict[str, Any]) -> None:
    model = shared_model()
    expected = reference(model, prompts(), max_new_tokens=16)
    assert_same(generate(model, prompts(), spread(model, 3, **options), max_new_tokens=16), expected)


def test_assisted_decoding() -> None:
    model = shared_model("mixtral")
    assistant = copy.deepcopy(model)
    detach(assistant)
    for parameter in assistant.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.004)
    inputs = prompts(batch=1)
    options = {"max_new_tokens": 24, "output_logits": False}
    expected = reference(model, inputs, **options)
    ours = generate(model, inputs, spread(model, 3, "mixtral"), assistant_model=assistant, **options)
    assert torch.equal(ours.sequences, expected.sequences)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_turns_crops_and_forks(family: str) -> None:
    model, results = shared_model(family), []
    detach(model)
    model.set_attn_implementation("eager")
    makers = [
        lambda: DynamicCache(config=model.config) if family != "gpt_oss" else DynamicCache(),
        lambda: spread(model, 3, family, sliding_layers="paged"),
    ]
    for make in makers:
        cache, inputs = make(), prompts()
        outputs = [generate(model, inputs, cache, max_new_tokens=12)]
        for seed in (5,):
            turn = torch.cat([outputs[-1].sequences, prompts(seed=seed)["input_ids"][:, -30:]], dim=1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(turn[:, 75:])], dim=1)
            again = {"input_ids": turn, "attention_mask": mask}
            outputs.append(generate(model, again, copy.deepcopy(cache), max_new_tokens=12))
            outputs.append(generate(model, again, cache, max_new_tokens=12))
            cache.crop(turn.shape[1] - 40)
            outputs.append(generate(model, again, cache, max_new_tokens=12))
        results.append(outputs)
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("devices", [2, 4])
def test_row_operations_in_the_middle_of_decoding(devices: int) -> None:
    model, logits = shared_model(), []
    for make in (DynamicCache, lambda: spread(model, devices)):
        cache, outputs, mask = make(), [], prompts(length=100)["attention_mask"]
        with torch.no_grad():
            model(**prompts(length=100), past_key_values=cache)
            for step, change in enumerate(("repeat", "reorder", "select", "crop", "deep crop", "reorder")):
                if change == "repeat":
                    cache.batch_repeat_interleave(2)
                    mask = mask.repeat_interleave(2, dim=0)
                elif "crop" in change:
                    cache.crop(-3 if change == "crop" else -60)
                    mask = mask[:, : -3 if change == "crop" else -60]
                else:
                    index = torch.tensor([0, 2, 5] if change == "select" else [1, 0, 1, 3, 4, 5][: len(mask)])
                    (cache.batch_select_indices if change == "select" else cache.reorder_cache)(index)
                    mask = mask[index]
                for _ in range(11):
                    token = torch.randint(2, 190, (len(mask), 1), generator=torch.Generator().manual_seed(step))
                    mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                    outputs.append(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits)
        logits.append(outputs)
    for ours, theirs in zip(logits[1], logits[0], strict=True):
        assert (ours - theirs).abs().max() <= 1e-4


def test_shared_prompts_stay_shared() -> None:
    """Beams and forks hold the pages of each device in common."""
    model = shared_model()
    one, many = spread(model, 3), spread(model, 3)
    with torch.no_grad():
        model(ids_of(300), past_key_values=one)
        model(ids_of(300), past_key_values=many)
    many.batch_repeat_interleave(5)
    forks = [many.fork() for _ in range(2)]
    assert many.nbytes - one.nbytes < 20_000
    assert many.memory_report().tokens_stored == one.memory_report().tokens_stored
    for fork in forks:
        model.generate(ids_of(301).expand(5, -1), past_key_values=fork, max_new_tokens=3, do_sample=True)
    assert_spread(many)


# Codecs


def coded(devices: int, codecs: tuple[str, str], **options: Any) -> tuple[torch.Tensor, PiKVCache]:
    model = shared_model()
    cache = spread(model, devices, key_codec=codecs[0], value_codec=codecs[1], rank=8, **options)
    logits = next_logits(model, read(model, cache, ids_of(300)), 300, steps=12)
    assert_spread(cache)
    assert any(
        pool.refcount.any() for layer in cache.layers for t in layer.tables() for pool in t.pages.sealed.values()
    )
    return logits, cache


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none" and "lowrank" not in name])
def test_pages_of_positions_are_packed_alike(codec: str) -> None:
    """Placed by position, the same tokens are in the same pages wherever these are: the same codes."""
    alone, many = (coded(number, (codec, codec), placement="hash")[0] for number in (1, 3))
    torch.testing.assert_close(many, alone, atol=1e-4, rtol=0)
    assert torch.equal(many.argmax(-1), alone.argmax(-1))


@pytest.mark.parametrize(
    "codecs", [*((name, name) for name in CODECS if name != "none"), ("int4", "none"), ("none", "int8")], ids=str
)
def test_no_codec_errs_more_on_several_devices(codecs: tuple[str, str]) -> None:
    """A shard that is divided fills other pages, and a low-rank basis is fitted in each part: no larger errors."""
    alone, many = (coded(number, codecs)[1].memory_report().per_codec for number in (1, 3))
    assert set(many) <= {*alone, "none"} or "auto" in codecs
    errors = []
    for held in (alone, many):
        tokens = sum(each.tokens for each in held.values())
        errors.append([sum(each.tokens * error(each) for each in held.values()) / tokens for error in ERRORS])
    for one, other in zip(*errors, strict=True):
        assert other <= 1.1 * one + 1e-6


#: Relative errors of what a codec holds; it has none of what it has not packed.
ERRORS = (lambda held: np.nan_to_num(held.key_error), lambda held: np.nan_to_num(held.value_error))


# Routing


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "all"])
def test_routing_that_leaves_nothing_out_is_exact(routing: str) -> None:
    model = shared_model()
    options = {"max_new_tokens": 16}
    expected = reference(model, prompts(), **options)
    cache = spread(model, 3, routing=routing, max_pages=1.0, coverage=1.0)
    assert_same(generate(model, prompts(), cache, **options), expected)


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "all"])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_each_part_chooses_its_own_pages(routing: str, codec: str) -> None:
    """What a part reads is what its own router chooses of its own pages, and no more than was asked for."""
    model = shared_model()
    cache = spread(model, 2, routing=routing, max_pages=3, key_codec=codec)
    read(model, cache, ids_of(400))
    logits = next_logits(model, cache, 400, steps=12)
    assert torch.isfinite(logits).all()
    for layer in cache.layers:
        for part in layer.parts:
            assert part.router is not None
            full = sum(len(row.full(name)) for row in part.table.rows for name in part.table.pages.pools())
            assert full > 6
    exact = next_logits(model, read(model, DynamicCache(config=model.config), ids_of(400)), 400, steps=12)
    assert (logits - exact).abs().max() > 1e-3, "everything was read"


# Budgets

BUDGETS: list[tuple[Any, str | None]] = [
    (104, None),
    (88, "layer"),
    (2 * 96, "cache"),
    (0.35, None),
    ("230KB", "cache"),
    ("115KB", "layer"),
    (12, "shard"),
    (0.4, "shard"),
    ("10KB", "shard"),
]


def check(cache: PiKVCache) -> None:
    """Every limit of the cache holds, over all parts: each token counts once, the window too."""
    options, layers, report = cache.pikv_config, paged_layers(cache), cache.memory_report()
    budget, scope, number = options.budget, options.budget_scope, layers[0].layout.parts
    if isinstance(budget, str):
        amount = int(float(budget.removesuffix("KB")) * 1000)
        if scope == "cache":
            assert cache.nbytes <= amount
        for index, layer in enumerate(layers):
            parts = [each for each in report.layers if each.layer == index]
            assert len(parts) == number
            if scope == "layer":
                assert sum(part.total for part in parts) <= amount
            elif scope == "shard":
                page = layer.table.pool.full_page_bytes * len(layer.table.rows)
                assert shard_tokens(layer).max() <= amount // page * layer.table.pool.page_size
            most = amount / number if scope == "layer" else amount / number / len(layers)
            assert scope == "shard" or all(part.total <= most for part in parts)
        return
    for layer in layers:
        most = budget if isinstance(budget, int) else int(budget * layer.seen)
        held = float(layer.held().sum(2).float().mean(1).max())
        least = 8 + options.recent_window + 2 * options.page_size * number
        if scope == "shard":
            assert shard_tokens(layer).max() <= (most if isinstance(budget, int) else most // layer.table.num_shards)
        elif scope == "cache" and isinstance(budget, int):
            assert held <= budget / len(layers)
        else:
            assert held <= (most if isinstance(budget, int) else max(most, least))


def shard_tokens(layer: PiKVLayer) -> np.ndarray:
    """Return the tokens that each sequence holds in each shard, wherever that is, means over KV heads, `(B, S)`."""
    held = np.zeros((len(layer.table.rows), layer.table.num_shards))
    for table in layer.tables():
        for name, pool in table.pages.pools().items():
            for row, sequence in enumerate(table.rows):
                pages = sequence.pages(name)
                np.add.at(
                    held[row], pool.shard[pages[pool.shard[pages] >= 0]], pool.count[pages[pool.shard[pages] >= 0]]
                )
    return held.reshape(layer.batch, -1, layer.table.num_shards).mean(1)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("turn", range(2))
def test_a_budget_holds_after_every_update(turn: int, scheduler: str) -> None:
    """Every scheduler with two kinds of budget, every kind with two, codecs and numbers of devices in turn."""
    number = SCHEDULERS.index(scheduler)
    budget, scope = BUDGETS[(number + 4 * turn) % len(BUDGETS)]
    model = shared_model() if scope == "cache" else single_layer()
    in_bytes = isinstance(budget, str) and scope != "shard"
    codec = "none" if in_bytes else ("none", "int4", "auto", "fp8", "lowrank")[(number + turn) % 5]
    prompt, devices = 480 if in_bytes else 160, 2 if in_bytes else 2 + (number + turn) % 2
    chunk = (prompt // 4, prompt)[(number + turn) % 2]
    options = {"key_codec": codec, "value_codec": codec, "rank": 4, "num_shards": 3}
    cache = spread(model, devices, budget=budget, budget_scope=scope, scheduler=scheduler, **options)
    ids = ids_of(prompt + 9, batch=1 if in_bytes else 2)
    with torch.no_grad():
        for part in (*ids[:, :prompt].split(chunk, dim=1), *ids[:, prompt:].split(1, dim=1)):
            model(part, past_key_values=cache, logits_to_keep=1)
            check(cache)
    assert_spread(cache)
    for layer in paged_layers(cache):
        assert sum(part.schedule.tokens_evicted for part in layer.parts) > 0


@pytest.mark.parametrize("budget", [104, "250KB"])
def test_a_budget_holds_with_beams_crops_and_forks(budget: Any) -> None:
    model = shared_model()
    cache = spread(model, 2, budget=104 if budget == 104 else "500KB")
    out = model.generate(ids_of(150), past_key_values=cache, num_beams=3, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 170)
    cache = spread(model, 2, budget=budget)
    read(model, cache, ids_of(400))
    check(cache)
    for length in (395, 350, 340):
        cache.crop(length)
        check(cache)
        next_logits(model, cache, length, steps=20)
        check(cache)
    fork = cache.fork()
    next_logits(model, fork, 360, steps=9)
    if budget == 104:
        # In bytes they hold the pages of both, and have budgets of both.
        check(cache)
        check(fork)


@pytest.mark.parametrize("budget", [8192, "100MB"])
def test_a_budget_that_is_not_reached_changes_nothing(budget: Any) -> None:
    model = shared_model()
    expected = reference(model, prompts(), max_new_tokens=16)
    assert_same(generate(model, prompts(), spread(model, 3, budget=budget), max_new_tokens=16), expected)


def test_a_budget_that_is_too_small_for_its_devices() -> None:
    model = shared_model()
    with pytest.raises(ValueError, match="leaves 60 tokens, but at least 72 are needed"):
        spread(model, 3, budget=60)
    cache = spread(model, 3, budget="60KB")
    with pytest.raises(BudgetError, match=r"a budget of 10000 bytes per layer leaves 10000"):
        read(model, cache, ids_of(100))


# Tiers


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_tiers_of_every_device(codec: str, tmp_path: Any) -> None:
    """Fast memory for a third of the pages; the rest is on disk, and comes back when it is read."""
    model = shared_model()
    ids = ids_of(300)
    options = {"key_codec": codec, "value_codec": codec, "placement": "hash"}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, inputs, spread(model, 1, **options), max_new_tokens=24)
    page = spread(model, 1, **options, tiers={"cpu": None, "disk": None})
    read(model, page, ids)
    whole = page.tiers.bytes_used()["cpu"]
    fast = max(whole // 3, 4 * 4096)
    cache = spread(model, 2, **options, tiers={"cpu": fast, "disk": None}, tier_directory=str(tmp_path))
    ours = generate(model, inputs, cache, max_new_tokens=24)
    assert_same(ours, expected)
    used = cache.tiers.bytes_used()
    assert 0 < used["cpu"] <= fast
    assert used["disk"] > 0
    assert cache.tiers.counters.misses > 0


# Presses


@pytest.mark.parametrize("press", PRESSES)
def test_presses_keep_what_they_keep_on_one_device(press: str) -> None:
    model, ids, devices = shared_model(), ids_of(120), 2 + list(PRESSES).index(press) % 2
    alone, many = (
        read(model, spread(model, number), ids, PRESSES[press](compression_ratio=0.5)) for number in (1, devices)
    )
    for one, other in zip(held_by(alone), held_by(many), strict=True):
        assert torch.equal(one, other)
    assert_spread(many)
    # Pages of low rank or few bits are others in a part: their errors differ.
    tolerance = 1e-4 if press not in ("pikv", "lora") else 1.0
    ours, theirs = (next_logits(model, cache, 120, steps=12) for cache in (many, alone))
    assert (ours - theirs).abs().mean() <= tolerance
    assert_spread(many)


@pytest.mark.parametrize("press", ["query_aware", "pyramid", "duo"])
def test_presses_on_padded_batches(press: str) -> None:
    model = shared_model()
    _, ids, mask = padded([100, 61, 88])
    alone, many = (
        read(model, spread(model, number), ids, PRESSES[press](compression_ratio=0.4), mask) for number in (1, 3)
    )
    for one, other in zip(held_by(alone), held_by(many), strict=True):
        assert torch.equal(one, other)
    assert_spread(many)


@pytest.mark.parametrize("name", ["KnormPress", "AdaKVPress"])
def test_presses_of_kvpress(name: str) -> None:
    """One assigns keys and values of the layer, the other marks tokens of single heads."""
    import kvpress

    model, ids = shared_model(), ids_of(150)
    press = kvpress.KnormPress(0.5) if name == "KnormPress" else kvpress.AdaKVPress(kvpress.KnormPress(0.5))
    alone, many = (read(model, spread(model, number), ids, press) for number in (1, 3))
    for one, other in zip(alone.layers, many.layers, strict=True):
        assert torch.equal(one.held(), other.held())
        torch.testing.assert_close(other.keys, one.keys)
        torch.testing.assert_close(other.values, one.values)
    ours, theirs = (next_logits(model, cache, 150, steps=30) for cache in (many, alone))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert_spread(many)


def test_assigned_tokens_are_spread() -> None:
    model = shared_model()
    cache, plain = spread(model, 3), DynamicCache(config=model.config)
    for each in (cache, plain):
        read(model, each, ids_of(200))
        for layer in each.layers:
            keys, values = layer.keys, layer.values
            layer.keys, layer.values = keys[:, :, ::2].contiguous(), values[:, :, ::2].contiguous()
    assert all(layer.get_seq_length() == 100 for layer in cache.layers)
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
        held = [sum(table.tokens()) for table in ours.tables()]
        assert sum(held) == 100
        assert max(held) <= 100 / 3 + 2 * SMALL["page_size"]


# Failure


@pytest.mark.parametrize(("codec", "part"), [("none", 0), ("none", 2), ("int8", 1)])
def test_a_device_without_memory_changes_nothing(part: int, codec: str) -> None:
    """A prompt, a chunk, decoded tokens and a crop: all parts are as they were, and go on when there is memory."""
    model, ids = shared_model(), ids_of(260)
    cache, plain = (spread(model, 3, key_codec=codec, value_codec=codec, placement="hash") for _ in range(2))
    with torch.no_grad():
        for each in (cache, plain):
            model(ids[:, :100], past_key_values=each)
        layer, failed = cache.layers[0], 0
        for begin, end in [(100, 170), *((n, n + 1) for n in range(170, 180))]:
            before = [layer.held(), *layer.dense()]
            cache.memory_report()
            with no_memory_for(layer, part) as tried:
                try:
                    ours = model(ids[:, begin:end], past_key_values=cache).logits
                except MemoryError:
                    failed += 1
                    cache.crop(begin)
                    assert all(torch.equal(a, b) for a, b in zip(before, [layer.held(), *layer.dense()], strict=True))
                    assert cache.get_seq_length() == begin
                    ours = None
            if ours is None:
                assert tried
                ours = model(ids[:, begin:end], past_key_values=cache).logits
            theirs = model(ids[:, begin:end], past_key_values=plain).logits
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert failed >= 1
    fork = cache.fork()
    before = [layer.held(), *layer.dense()]
    with no_memory_for(layer, part) as tried:
        try:
            layer.truncate(101)
        except MemoryError:
            assert layer.seen == 180
            assert all(torch.equal(a, b) for a, b in zip(before, [layer.held(), *layer.dense()], strict=True))
            layer = None
    if layer is not None:
        assert layer.seen == 101
    assert fork.get_seq_length() == 180


# Which devices


def devices_of(model: Any, devices: Any, max_memory: Any = None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    found = find_devices(model, devices, max_memory)
    return found.names, found.weights


def with_accelerators(monkeypatch: pytest.MonkeyPatch, free: dict[Any, int]) -> None:
    """Let accelerate and torch see some GPUs."""

    def get_max_memory(max_memory: Any = None) -> dict[Any, int]:
        from accelerate.utils import convert_file_size_to_int

        given = free if max_memory is None else max_memory
        return {key: convert_file_size_to_int(value) for key, value in given.items()}

    monkeypatch.setattr("accelerate.utils.get_max_memory", get_max_memory)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: sum(isinstance(key, int) for key in free))
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))


def test_auto_without_accelerators() -> None:
    assert devices_of(None, "auto") == (("cpu",), (1.0,))
    cache = PiKVCache.for_model(shared_model(), devices="auto", **SMALL)
    assert [layer.layout.places for layer in cache.layers] == [(Place(0, None, "cpu"),)] * 2


def test_auto_takes_what_accelerate_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    with_accelerators(monkeypatch, {0: 10 * 2**30, 1: 30 * 2**30, "cpu": 64 * 2**30})
    assert devices_of(None, "auto") == (("cuda:0", "cuda:1"), (10 * 2.0**30, 30 * 2.0**30))
    assert devices_of(None, "auto", {0: "1GiB", 1: "2GiB"}) == (("cuda:0", "cuda:1"), (2.0**30, 2.0**31))
    assert devices_of(None, "auto", {0: "1GiB", "cpu": 2**30}) == (("cuda:0", "cpu"), (2.0**30, 2.0**30))
    assert devices_of(None, "auto", {1: "1GiB", "disk": 5}) == (("cuda:1",), (2.0**30,))
    # The logical devices of the CPU divide its memory.
    assert devices_of(None, ["cuda:1", "cpu:0", "cpu:1"])[1] == (30 * 2.0**30, 32 * 2.0**30, 32 * 2.0**30)
    assert devices_of(None, [0, torch.device("cuda", 1)])[0] == ("cuda:0", "cuda:1")
    assert devices_of(None, ["cuda"])[0] == ("cuda:0",)
    with pytest.raises(ValueError, match="device 'cuda:2' is not there: 2 devices of type 'cuda'"):
        find_devices(None, ["cuda:2"], None)


def test_shares_follow_the_memory() -> None:
    model = shared_model()
    given = {"cpu:0": "1GiB", "cpu:1": "3GiB", "cpu:2": 0}
    cache = PiKVCache.for_model(model, devices=list(given), max_memory=given, **SMALL)
    read(model, cache, ids_of(1000))
    for layer in cache.layers:
        layer.settle()
        held = [sum(report.shard_tokens) for report in cache.memory_report().layers if report.layer == layer.layer_idx]
        assert held[2] == 0
        assert abs(held[1] / sum(held) - 0.75) < 0.05


def test_a_home_that_is_not_among_the_devices() -> None:
    """The window is with the layer's attention, the shards are not."""
    found = find_devices(None, ["cpu:0", "cpu:1"], {"cpu:0": 1, "cpu:1": 3})
    layout = found.around(torch.device("cuda", 0))
    assert layout.weights == (0.0, 1.0, 3.0)
    assert layout.places == (
        Place(0),
        Place(1, torch.device("cpu", 0), "cpu:0"),
        Place(2, torch.device("cpu", 1), "cpu:1"),
    )
    home = found.around(torch.device("cpu"))
    assert home.weights == (1.0, 3.0)
    assert [place.name for place in home.places] == ["cpu:0", "cpu:1"]


def test_the_home_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_accelerators(monkeypatch, {0: 4, 1: 5, 2: 6, "cpu": 7})
    layout = find_devices(None, "auto", None).around(torch.device("cuda", 1))
    assert [place.name for place in layout.places] == ["cuda:1", "cuda:0", "cuda:2"]
    assert layout.weights == (5.0, 4.0, 6.0)
    assert layout.places[0].device is None
    # A device without a number is the first of its type.
    assert find_devices(None, [0, 1], None).around(torch.device("cuda")).places[0].name == "cuda:0"


@pytest.mark.parametrize(
    ("devices", "max_memory", "error", "message"),
    [
        ("cuda", None, ValueError, "devices must be \"auto\" or a list of devices, got 'cuda'"),
        (2, None, TypeError, 'devices must be "auto" or a list of devices, got 2'),
        ([], None, ValueError, "devices must name at least one device, got an empty list"),
        (["cpu", "cpu"], None, ValueError, 'device \'cpu\' is named 2 times; parts on one CPU are "cpu:0", "cpu:1"'),
        (["cpu:1", "cpu:0", "cpu:1"], None, ValueError, "device 'cpu:1' is named 2 times$"),
        (["cuda:7"], None, ValueError, "device 'cuda:7' is not there: 0 devices of type 'cuda'"),
        ([3], None, ValueError, "device 'cuda:3' is not there: 0 devices"),
        (["mps"], None, ValueError, "device 'mps:0' is not there: 0 devices of type 'mps'"),
        (["gpu:0"], None, ValueError, "'gpu:0' is no device that torch knows: Expected one of cpu, cuda"),
        (["cuda:-1"], None, ValueError, "'cuda:-1' is no device that torch knows"),
        (["cpu", "disk"], None, ValueError, "cannot compute on the device 'disk'"),
        ([True], None, TypeError, "a device must be a name, a number or a torch.device, got True"),
        ([None], None, TypeError, "got None"),
        (["cpu:0", "cpu:1"], {"cpu:0": 5}, ValueError, "max_memory says nothing of 'cpu:1', only of cpu:0"),
        (["cpu:0"], {"cpu:0": 0}, ValueError, r"devices cpu:0 have no memory to give: \(0.0,\)"),
        (["cpu:0"], {"cpu:0": "much"}, ValueError, "got 'much' for 'cpu:0'"),
        (["cpu:0"], {"cpu:0": None}, TypeError, "got None for 'cpu:0'"),
        (["cpu:0"], {"cpu:0": 1.5}, TypeError, "got 1.5 for 'cpu:0'"),
        (["cpu:0"], {"cpu:0": -5}, ValueError, "-5"),
        ("auto", ["cpu"], TypeError, r"max_memory must be a mapping from devices to bytes, got \['cpu'\]"),
        (None, {"cpu": 5}, ValueError, "max_memory={'cpu': 5} divides shards among devices; give devices=\"auto\""),
    ],
    ids=str,
)
def test_devices_that_cannot_be(devices: Any, max_memory: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PiKVCache.for_model(shared_model(), devices=devices, max_memory=max_memory, **SMALL)


def test_devices_and_processes_at_once() -> None:
    with pytest.raises(ValueError, match=r"give either devices or process_group, got devices=\['cpu'\]"):
        PiKVCache.for_model(shared_model(), devices=["cpu"], process_group="world")
