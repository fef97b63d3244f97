"""Shapes of models that plans are made for."""

from pikv_hf.eval.cli.plan_command import MODEL_CONFIGS
from pikv_hf.planning.hardware import DEVICES
from pikv_hf.planning.model_shape import LayerShape, ModelShape, load_config, shape_of

LAYER = LayerShape(kv_heads=4, query_heads=32, key_dim=128, value_dim=128, experts=64, top_k=4, expert_params=10**6)
MODEL = ModelShape("test", (LAYER,) * 8, 10**9, 64 * 8 * 10**6, 10**8)
GPU = DEVICES["H100"]


def bundled(name: str) -> ModelShape:
    return shape_of(load_config(name, MODEL_CONFIGS), name)
