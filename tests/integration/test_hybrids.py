"""Hybrids: full attention is paged, layers with convolution or recurrent states stay transformers' own."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from pikv_hf import PiKVCache, PiKVConfig, detach
from pikv_hf.common.tensors import live_bytes
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.models.tiny_models import VOCAB, tiny_model
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.layer.own_layer import has_positions, is_state_layer, layers_of, tensors_of
from pikv_hf.planning.state_bytes import bytes_of_states

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
#: By model type: options that give a layer of each kind, and whether the model has expert routers.
HYBRIDS: dict[str, tuple[dict[str, Any], bool]] = {
    "qwen3_next": ({"num_hidden_layers": 5}, True),
    "qwen3_5_moe_text": ({"num_hidden_layers": 5}, True),
    "lfm2_moe": ({}, True),
    "jamba": ({"num_hidden_layers": 4}, True),
    # Attention comes first, unlike in the others.
    "granitemoehybrid": ({"layer_types": ["attention", "mamba", "attention"]}, True),
    "nemotron_h": ({"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "moe"]}, True),
    "lara_mini": ({"num_hidden_layers": 5}, True),
    # Both in each layer: K/V and states stay transformers' own.
    "falcon_h1": (
        {
            **{"num_hidden_layers": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
            **{"mamba_d_state": 16, "mamba_chunk_size": 8, "mamba_expand": 1},
        },
        False,
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, False),
    "olmo_hybrid": ({"num_hidden_layers": 5}, False),
}
#: Strategies with which a cache must do what DynamicCache does.
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunks": {"prefill_chunk_size": 13},
    "several": {"num_return_sequences": 2, "num_beams": 2},
}

knows_states = hasattr(Cache, "update_recurrent_state")
needs_states = pytest.mark.skipif(not knows_states, reason="this transformers' caches hold no states")


@functools.cache
def model_of(name: str) -> Any:
    return tiny_model(name, **HYBRIDS[name][0])


def new_cache(name: str, **options: Any) -> PiKVCache:
    placement = "expert" if HYBRIDS[name][1] else "hash"
    return PiKVCache.for_model(model_of(name), **{**SMALL, "placement": placement, **options})


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(name: str, cache: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a call, `(B, Q, V)`."""
    with torch.no_grad():
        logits: torch.Tensor = model_of(name)(tokens, attention_mask=mask, **cache_argument(cache)).logits
    return logits


def dynamic(name: str) -> Any:
    return DynamicCache(config=model_of(name).config)


@pytest.mark.skipif(knows_states, reason="this transformers keeps states beside K/V")
@pytest.mark.parametrize("name", ["qwen3_next", "lfm2_moe", "jamba"])
def test_older_releases_are_told_what_they_lack(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(ValueError, match=r"cache of the model's own; newer releases, 5\.24 say"):
        PiKVCache.for_model(model)
    with pytest.raises(ValueError, match=r"layers of type|recurrent state"):
        PiKVCache(model.config)


@needs_states
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attached", [True, False])
def test_generates_as_with_dynamic_cache(name: str, padded: bool, attached: bool) -> None:
    model, prompt = model_of(name), ids(3, 45)
    mask = torch.ones_like(prompt)
    mask[1, : 9 * padded] = 0
    detach(model)
    runs = {}
    for strategy, options in STRATEGIES.items():
        cache = dynamic(name)
        given = {**GREEDY, **options, "return_dict_in_generate": True, "output_logits": True}
        runs[strategy] = model.generate(prompt, attention_mask=mask, **given, **cache_argument(cache))
    for strategy, options in STRATEGIES.items():
        cache = new_cache(name) if attached else PiKVCache(model.config, PiKVConfig(**SMALL))
        given = {**GREEDY, **options, "return_dict_in_generate": True, "output_logits": True}
        output = model.generate(prompt, attention_mask=mask, **given, **cache_argument(cache))
        assert torch.equal(output.sequences, runs[strategy].sequences), strategy
        if "num_beams" not in options:
            logits = [torch.stack(each.logits) for each in (output, runs[strategy])]
            torch.testing.assert_close(*logits, atol=1e-3, rtol=0)
        if attached:
            assert not cache.stats().dense_layers


@needs_states
@pytest.mark.parametrize("name", HYBRIDS)
def test_kinds_of_layers(name: str) -> None:
    cache, empty = new_cache(name), layers_of(model_of(name).config)
    assert any(map(is_state_layer, cache.layers))
    assert any(isinstance(layer, PiKVLayer) for layer in cache.layers) == (name != "falcon_h1")
    assert [type(layer) for layer in cache.layers if not isinstance(layer, PiKVLayer)] == [
        type(theirs) for theirs, layer in zip(empty, cache.layers, strict=True) if not isinstance(layer, PiKVLayer)
    ]
    routed = [layer.has_expert_router for layer in cache.layers if isinstance(layer, PiKVLayer)]
    assert (bool(routed) and all(routed)) == HYBRIDS[name][1]


@needs_states
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("copied", [PiKVCache.fork, copy.deepcopy])
def test_copies_go_on_by_themselves(name: str, copied: Callable[[Any], PiKVCache]) -> None:
    cache, theirs = new_cache(name), dynamic(name)
    for each in (cache, theirs):
        read(name, each, ids(2, 30))
    twin, their_twin = copied(cache), copy.deepcopy(theirs)
    for step in range(3):
        for ours, expected, seed in ((cache, theirs, step), (twin, their_twin, 50 + step)):
            logits = [read(name, each, ids(2, 1 + step, seed)) for each in (ours, expected)]
            torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


@needs_states
@pytest.mark.parametrize("name", HYBRIDS)
def test_rows(name: str) -> None:
    cache, theirs = new_cache(name), dynamic(name)
    for each in (cache, theirs):
        read(name, each, ids(3, 30))
        each.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(*(read(name, each, ids(3, 2)).argmax(-1) for each in (cache, theirs)))
    # transformers' own states have rows reordered alone.
    for each in (cache, theirs):
        each.reorder_cache(torch.tensor([1, 2]))
    cache.batch_repeat_interleave(2)
    theirs.reorder_cache(torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(*(read(name, each, ids(4, 2)) for each in (cache, theirs)), atol=1e-3, rtol=0)
    cache.batch_select_indices(torch.tensor([3, 1]))
    theirs.reorder_cache(torch.tensor([3, 1]))
    torch.testing.assert_close(*(read(name, each, ids(2, 2)) for each in (cache, theirs)), atol=1e-3, rtol=0)
    with pytest.raises(IndexError, match="row 2 is out of range for a cache of 2 rows"):
        cache.reorder_cache(torch.tensor([2]))


@needs_states
@pytest.mark.parametrize("name", HYBRIDS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    cache = new_cache(name)
    read(name, cache, ids(2, 30))
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model_of(name))
    for step in range(3):
        assert torch.equal(*(read(name, each, ids(2, 1 + step, step)) for each in (cache, loaded)))
    PiKVCache.load(tmp_path / "cache", model_of(name)).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "cache").read_bytes()


@needs_states
@pytest.mark.parametrize("name", ["qwen3_next", "lara_mini", "lfm2_moe"])
def test_from_a_filled_dynamic_cache(name: str) -> None:
    theirs = dynamic(name)
    read(name, theirs, ids(2, 30))
    cache = PiKVCache.from_cache(model_of(name), theirs, placement="hash")
    before = [tensor.clone() for layer in theirs.layers for tensor in tensors_of(layer).values()]
    logits = read(name, cache, ids(2, 3, 1))
    assert all(map(torch.equal, before, (x for layer in theirs.layers for x in tensors_of(layer).values())))
    torch.testing.assert_close(logits, read(name, theirs, ids(2, 3, 1)), atol=1e-3, rtol=0)


@needs_states
@pytest.mark.parametrize("name", HYBRIDS)
def test_crops_all_or_nothing(name: str) -> None:
    cache, theirs = new_cache(name), dynamic(name)
    for each in (cache, theirs):
        read(name, each, ids(2, 30))
    with pytest.raises(ValueError, match=r"crop to 28 of 30 tokens: layer \d has a (recurrent|convolution) state"):
        cache.crop(-2)
    assert {layer.get_seq_length() for layer in cache.layers if has_positions(layer)} == {30}
    cache.crop(30)
    torch.testing.assert_close(*(read(name, each, ids(2, 3)) for each in (cache, theirs)), atol=1e-3, rtol=0)
    cache.reset()
    torch.testing.assert_close(read(name, cache, ids(1, 9)), read(name, dynamic(name), ids(1, 9)), atol=1e-3, rtol=0)


@needs_states
def test_convolutions_that_record_can_be_cropped() -> None:
    model, prompt = model_of("lfm2_moe"), ids(1, 12).repeat(1, 4)
    options = {**GREEDY, "max_new_tokens": 16, "prompt_lookup_num_tokens": 3}
    expected = model.generate(prompt, **options, **cache_argument(dynamic("lfm2_moe")))
    assert torch.equal(model.generate(prompt, **options, **cache_argument(new_cache("lfm2_moe"))), expected)
    cache, theirs = new_cache("lfm2_moe"), dynamic("lfm2_moe")
    for each in (cache, theirs):
        each.activate_past_recording()
        read("lfm2_moe", each, ids(1, 20))
        each.crop(-5)
    torch.testing.assert_close(*(read("lfm2_moe", each, ids(1, 2)) for each in (cache, theirs)), atol=1e-3, rtol=0)
    # Both have forgotten by now what comes before the last crop.
    with pytest.raises(ValueError, match="has recorded the last"):
        cache.crop(-9)
    assert cache.get_seq_length() == 17


@needs_states
@pytest.mark.parametrize("name", HYBRIDS)
def test_bytes(name: str) -> None:
    cache = new_cache(name)
    assert cache.memory_report().state == 0
    read(name, cache, ids(2, 30))
    others = [layer for layer in cache.layers if not isinstance(layer, PiKVLayer)]
    own = [tensor for layer in others for tensor in tensors_of(layer).values()]
    report = cache.memory_report()
    assert sum(layer.total for layer in report.layers if layer.kind != "paged") == live_bytes(own)
    states = bytes_of_states(copy.deepcopy(model_of(name)).to("meta"), layers_of(model_of(name).config))
    assert {layer.layer: layer.state for layer in report.layers if layer.state} == {
        index: 2 * size for index, size in states.items()
    }
    assert "state" in str(report)


@needs_states
@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
@pytest.mark.parametrize(
    "options",
    [
        {"tiers": {"cpu": "1 MiB"}},
        {"key_codec": "int8", "value_codec": "int8"},
        {"routing": "page_bound", "max_pages": 1000},
        {"budget": "1 MiB"},
        {"sliding_layers": "paged"},
    ],
)
def test_options(name: str, options: dict[str, Any]) -> None:
    cache, theirs = new_cache(name, **options), dynamic(name)
    tolerance = 0.2 if "key_codec" in options else 1e-3
    for tokens in (ids(2, 60), *(ids(2, 1, seed) for seed in range(9))):
        logits = [read(name, each, tokens) for each in (cache, theirs)]
        torch.testing.assert_close(*logits, atol=tolerance, rtol=0)


def unknown_argument(name: str, cache: Any, tokens: torch.Tensor) -> None:
    model_of(name)(tokens, **cache_argument(cache), foo=1)


def not_causal(name: str, cache: Any, tokens: torch.Tensor) -> None:
    model_of(name)(tokens, **cache_argument(cache), is_causal=False)


def another_model(name: str, cache: Any, tokens: torch.Tensor) -> None:
    other = copy.deepcopy(model_of(name))
    PiKVCache.for_model(other, placement="hash")
    other(tokens, **cache_argument(cache))


def padding_shown(name: str, cache: Any, tokens: torch.Tensor) -> None:
    model_of(name)(tokens, **cache_argument(cache))


def a_copy_of_the_model(name: str, cache: Any, tokens: torch.Tensor) -> None:
    copy.deepcopy(model_of(name))(tokens, **cache_argument(cache))


@needs_states
@pytest.mark.parametrize(
    ("refused", "padding"),
    [(unknown_argument, 0), (not_causal, 0), (another_model, 0), (padding_shown, 3), (a_copy_of_the_model, 3)],
)
@pytest.mark.parametrize("name", sorted(set(HYBRIDS) - {"falcon_h1"}))
@torch.no_grad()
def test_a_refused_call_changes_no_state(name: str, refused: Callable[..., None], padding: int) -> None:
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :padding] = 0
    given, more = (mask, torch.nn.functional.pad(mask, (0, 3), value=1)) if padding else (None, None)
    reference, cache = dynamic(name), new_cache(name)
    for each in (reference, cache):
        read(name, each, ids(2, 20), given)
    expected = read(name, reference, ids(2, 3, seed=1), more)
    with pytest.raises((ValueError, NotImplementedError)):
        refused(name, cache, ids(2, 3, seed=1))
    assert (read(name, cache, ids(2, 3, seed=1), more) - expected).abs().max() <= 1e-4


@needs_states
def test_what_no_layer_understands_is_refused_before_the_first() -> None:
    test_a_refused_call_changes_no_state("falcon_h1", unknown_argument, 0)


@needs_states
@torch.no_grad()
def test_a_layer_asks_for_its_own_offset() -> None:
    """Inkling's later layers ask how far the cache is when earlier ones have got the call's tokens already."""
    model = tiny_model("inkling_text")
    caches = PiKVCache(model.config), DynamicCache(config=model.config)
    for tokens in (ids(2, 40), ids(2, 1), ids(2, 5)):
        torch.testing.assert_close(*(model(tokens, **cache_argument(each)).logits for each in caches))
