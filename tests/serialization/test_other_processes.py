"""Caches go to other processes as files: by save() and load(), never by pickle."""

import copy
import multiprocessing
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_in_a_child import load_and_go_on
from families import FAMILIES
from save_round_trip import assert_equal
from saved_runs import go_on, new_cache, read, shared_model

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.serialization.tensor_file import CacheFileError

MAKE: dict[str, Callable[[Any], PiKVCache]] = {
    "attached": lambda model: new_cache(model, key_codec="int8", value_codec="int8"),
    "of a config": lambda model: PiKVCache(model.config, PiKVConfig(page_size=8, recent_window=16, num_shards=3)),
    "of a config, coded": lambda model: PiKVCache(
        model.config, PiKVConfig(page_size=8, recent_window=16, key_codec="int4", value_codec="int4")
    ),
}
WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "pickle": lambda cache, folder: pickle.dumps(cache),
    "torch.save": lambda cache, folder: torch.save({"cache": cache}, folder / "cache.pt"),
    "a pipe": lambda cache, folder: multiprocessing.Pipe()[0].send([cache]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MAKE)
def test_pickling_a_cache_says_what_to_do(kind: str, way: str, tmp_path: Path) -> None:
    model = shared_model()
    cache = read(model, MAKE[kind](model), tokens=40)
    with pytest.raises(TypeError, match=r"a PiKVCache cannot be pickled: write it with save\(\) and read .*load\(\)$"):
        WAYS[way](cache, tmp_path)
    twins = copy.deepcopy(cache), copy.copy(cache)
    expected = go_on(model, twins[0])
    torch.testing.assert_close(go_on(model, twins[1]), expected, atol=1e-4, rtol=1e-4)
    assert cache.layers is twins[1].layers, "what copy.copy makes of a DynamicCache"


@pytest.mark.slow
def test_a_spawned_process_goes_on_with_saved_caches(tmp_path: Path) -> None:
    model = shared_model()
    caches = {kind: read(model, make(model), tokens=60) for kind, make in MAKE.items()}
    for kind, cache in caches.items():
        cache.save(tmp_path / kind)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    child = context.Process(target=load_and_go_on, args=([tmp_path / kind for kind in caches], results))
    child.start()
    for cache in caches.values():
        assert results.get(timeout=120) == go_on(model, cache).argmax(-1).tolist()
    child.join(60)
    assert child.exitcode == 0


# Made from a config alone


@pytest.mark.parametrize("family", ["qwen3_moe", "llama", "gpt_oss", "deepseek_v3"])
def test_a_cache_of_a_config_comes_back(family: str, tmp_path: Path) -> None:
    model = shared_model(family)
    cache = read(model, MAKE["of a config"](model), tokens=60)
    cache.save(tmp_path / "cache")
    loaded = [PiKVCache.load(tmp_path / "cache", given) for given in (model, model.config)]
    for each in loaded:
        assert each.attachment is None
        assert_equal(cache, each)
    expected = go_on(model, cache)
    for each in loaded:
        torch.testing.assert_close(go_on(model, each), expected, atol=1e-4, rtol=1e-4)


def test_what_a_cache_of_a_config_is_not_loaded_with(tmp_path: Path) -> None:
    model = shared_model()
    path = tmp_path / "cache"
    read(model, MAKE["of a config"](model), tokens=60).save(path)
    other = FAMILIES["qwen3_moe"].build(num_hidden_layers=2, rms_norm_eps=1e-3)
    for given in (other, other.config):
        with pytest.raises(CacheFileError, match=r"rms_norm_eps is 1e-06 there and 0\.001 here"):
            PiKVCache.load(path, given)
    with pytest.raises(
        CacheFileError, match="made from a config alone: such a cache is in one part, so give no devices"
    ):
        PiKVCache.load(path, model, devices=["cpu:0", "cpu:1"])
    with pytest.raises(ValueError, match="budget=30 passes over tokens, which only PiKV's attention can do"):
        PiKVCache.load(path, model, budget=30)
    read(model, new_cache(model), tokens=60).save(path)
    message = (
        f"{path} was saved with a model, whose weights are compared: load it with the model, got only a Qwen3MoeConfig"
    )
    with pytest.raises(CacheFileError, match=re.escape(message)):
        PiKVCache.load(path, model.config)
