"""Shapes of models: parameters, heads and experts, from the configs that are bundled or saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES
from planned_models import bundled

from pikv_hf import PiKVCache
from pikv_hf.eval.cli.plan_command import MODEL_CONFIGS
from pikv_hf.layer.input_checks import KVFormat
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.planning.model_shape import expected_experts, load_config, shape_of

# Parameters, layers, paged ones, KV heads, dims of keys and values.
BUNDLED = {
    "Qwen/Qwen3-30B-A3B": (30_532_122_624, 48, 48, 4, 128, 128),
    "mistralai/Mixtral-8x7B-v0.1": (46_702_792_704, 32, 32, 8, 128, 128),
    "allenai/OLMoE-1B-7B-0924": (6_919_161_856, 16, 16, 16, 128, 128),
    "openai/gpt-oss-20b": (20_914_757_184, 24, 12, 8, 64, 64),
    "openai/gpt-oss-120b": (116_829_156_672, 36, 18, 8, 64, 64),
    # One latent and its rotary key for all heads.
    "deepseek-ai/DeepSeek-V2-Lite": (15_706_484_224, 27, 27, 1, 512, 64),
}


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
    cache = PiKVCache.for_model(model, placement="hash")
    model(torch.randint(2, 99, (1, 40)), past_key_values=cache)
    for layer, expected in zip(cache.layers, shape.layers, strict=True):
        stored = layer.store.kv_format() if isinstance(layer, PiKVLayer) else KVFormat.of(layer.keys, layer.values)
        assert stored.shape[1:] == (expected.kv_heads, expected.key_dim, expected.value_dim)
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
        (__file__, r"test_model_shapes.py' is no config"),
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


def test_configs_are_small_files():
    assert all(path.stat().st_size < 4096 for path in Path(MODEL_CONFIGS).iterdir())
