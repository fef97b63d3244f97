"""Shards on several devices of one process: the same tokens as on one, with any codec and routing."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from device_runs import assert_spread, cpus, shared_model, spread
from exact_runs import assert_same, generate, reference
from families import FAMILIES, prompts
from press_runs import ids_of, next_logits, read
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.config import CODECS, ROUTINGS

pytestmark = pytest.mark.slow

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
    tables = [table for layer in cache.layers for table in layer.store.tables()]
    assert any(pool.allocator.refcount.any() for table in tables for pool in table.pools.packed.values())
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
            assert part.page_router is not None
            full = sum(len(row.full_pages(name)) for row in part.table.rows for name in part.table.pools.by_id())
            assert full > 6
    exact = next_logits(model, read(model, DynamicCache(config=model.config), ids_of(400)), 400, steps=12)
    assert (logits - exact).abs().max() > 1e-3, "everything was read"
