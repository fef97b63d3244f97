"""What is refused where an indexer chooses tokens: before anything has changed, or so that it can be taken back."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from indexed_models import (
    BLOCKS,
    NAMES,
    SMALL,
    assert_same_tokens,
    dynamic,
    ids,
    model_of,
    needs_indexers,
    new_cache,
    read,
)
from transformers import DynamicCache

from pikv_hf import PiKVCache, detach
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.models.tiny_models import tiny_config, tiny_model
from pikv_hf.presses import QueryAwarePress

pytestmark = needs_indexers


def test_a_call_that_ends_between_latents_and_indexer_can_be_taken_back() -> None:
    name = "deepseek_v32"
    model, cache, theirs = model_of(name), new_cache(name), dynamic(name)
    for each in (cache, theirs):
        read(name, each, ids(2, 40))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.indexer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        read(name, cache, ids(2, 2))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"cache\.crop"):
        read(name, cache, ids(2, 2))
    cache.crop(40)
    torch.testing.assert_close(read(name, cache, ids(2, 1)), read(name, theirs, ids(2, 1)), atol=1e-3, rtol=0)
    assert_same_tokens(cache, theirs)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"routing": "page_bound"}, "routing='page_bound'"), ({"budget": "1 MiB"}, "budget='1 MiB'")],
)
def test_choosing_twice_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"indexer of the model's own chooses.*{said}"):
        new_cache("deepseek_v32", **options)


def wrong_dtype(cache: Any) -> None:
    cache.update(torch.zeros(2, 1, 1, 16), torch.zeros(2, 1, 1, 8), 0)
    cache.update_indexer(torch.zeros(2, 1, 24, dtype=torch.float64), 0)


def twice(cache: Any) -> None:
    cache.update_indexer(torch.zeros(2, 1, 24), 0)


def assigned(cache: Any) -> None:
    cache.layers[0].keys = cache.layers[0].keys[:, :, ::2]


def values_assigned(cache: Any) -> None:
    cache.layers[0].values = cache.layers[0].values[:, :, ::2]


def kept(cache: Any) -> None:
    cache.layers[0].keep(torch.ones(2, 1, 30, dtype=torch.bool))


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (wrong_dtype, r"float64.*float32"),
        (twice, "before the K/V of their tokens, or twice"),
        (assigned, "cannot be assigned"),
        (values_assigned, "cannot be assigned"),
        (kept, "an indexer of the model's own chooses"),
    ],
)
def test_what_does_not_fit_is_refused(refused: Callable[[Any], None], said: str) -> None:
    name = "deepseek_v32"
    cache, theirs = PiKVCache(model_of(name).config), dynamic(name)
    detach(model_of(name))
    for each in (cache, theirs):
        read(name, each, ids(2, 30))
    with pytest.raises((ValueError, RuntimeError), match=said):
        refused(cache)
    torch.testing.assert_close(read(name, cache, ids(2, 1)), read(name, theirs, ids(2, 1)), atol=0, rtol=0)
    assert_same_tokens(cache, theirs)


def test_a_cache_without_indexer_keys_is_no_source() -> None:
    name = "deepseek_v32"
    plain = DynamicCache()
    for index in range(3):
        plain.update(torch.zeros(1, 1, 5, 16), torch.zeros(1, 1, 5, 8), index)
    with pytest.raises(TypeError, match="needs the keys of an indexer"):
        PiKVCache.from_cache(model_of(name), plain)


def test_indices_that_are_no_positions_are_refused() -> None:
    name = "deepseek_v32"
    model = copy.deepcopy(model_of(name))
    cache = PiKVCache.for_model(model, **SMALL)
    with torch.no_grad():
        model(ids(2, 30), **cache_argument(cache))
    indexer = model.model.layers[0].self_attn.indexer
    indexer.register_forward_hook(lambda _, args, out: out.float())
    with pytest.raises(NotImplementedError, match=r"indices that are no integers \(2, 1, 'k'\)"), torch.no_grad():
        model(ids(2, 1), **cache_argument(cache))


def test_padding_that_comes_later_is_refused_where_it_is_compared() -> None:
    cache, theirs = new_cache(BLOCKS), dynamic(BLOCKS)
    for each in (cache, theirs):
        read(BLOCKS, each, ids(2, 30))
    mask = torch.ones(2, 33, dtype=torch.long)
    mask[0, 30:32] = 0
    with pytest.raises(NotImplementedError, match="compares padding, too"):
        read(BLOCKS, cache, ids(2, 3), mask)
    assert [layer.get_seq_length() for layer in cache.layers] == [30] * 3
    torch.testing.assert_close(read(BLOCKS, cache, ids(2, 1)), read(BLOCKS, theirs, ids(2, 1)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_refused_before_the_first_layer(name: str) -> None:
    cache = new_cache(name)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotImplementedError, match=r"float32 beside K/V in.*bfl"):
        read(name, cache, ids(1, 20))
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * 3


def test_a_call_that_ends_between_layers_is_named() -> None:
    name = "deepseek_v32"
    model, cache = model_of(name), new_cache(name)
    read(name, cache, ids(2, 40))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        read(name, cache, ids(2, 2))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"different lengths, \[40, 42\].*cache\.crop\(40\)"):
        read(name, cache, ids(2, 2))
    cache.crop(40)
    theirs = dynamic(name)
    read(name, theirs, ids(2, 40))
    torch.testing.assert_close(read(name, cache, ids(2, 1)), read(name, theirs, ids(2, 1)), atol=1e-3, rtol=0)


OTHERS = "DynamicIndexedLayer.*indexers that compare single tokens, where no layer shares"


@pytest.mark.parametrize("make", [PiKVCache.for_model, lambda model: PiKVCache(model.config)])
def test_pooled_tokens_are_refused_when_a_cache_is_made(make: Callable[[Any], PiKVCache]) -> None:
    with pytest.raises(ValueError, match=OTHERS):
        make(tiny_model("glm5_next"))


def test_indexers_beside_shared_tokens_are_refused_when_a_cache_is_made() -> None:
    config = tiny_config("mistral_large4")
    text = config.text_config.to_dict()
    derived = ("no_rope_layers", "mlp_layer_types", "layer_types", "model_type", "transformers_version")
    plain = {name: value for name, value in text.items() if name not in derived}
    changed = {"kv_source_layers": [0, 0, 2], "indexer_types": ["full", "shared", "full"]}
    config.text_config = type(config.text_config)(**{**plain, **changed})
    with pytest.raises(ValueError, match=OTHERS):
        PiKVCache(config)


def test_presses_are_refused() -> None:
    for name in ("deepseek_v32", BLOCKS):
        with (
            pytest.raises(NotImplementedError, match="an indexer of its own chooses"),
            QueryAwarePress(0.5)(model_of(name)),
        ):
            raise AssertionError
