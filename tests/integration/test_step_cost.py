"""What a decoding step costs beside arithmetic: Python calls and torch operations, which no machine changes."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, DynamicCache, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument

#: What a layer's step may cost beyond DynamicCache's.
MOST_CALLS, MOST_OPERATIONS = 120, 20
#: By which the host waits for a device.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")

Make = Callable[[Any], Cache]


def with_pikv(model: Any) -> Cache:
    return PiKVCache.for_model(model)


def with_dynamic(model: Any) -> Cache:
    return DynamicCache(config=model.config)


class Operations(TorchDispatchMode):
    """Counts torch operations and notes their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def step_within_a_page(layers: int, make: Make) -> Callable[[], object]:
    """Return a decoding step of a small model over a cache whose pages have room left."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 16, "vocab_size": 128}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=layers, **sizes, **experts)).eval()
    cache, tokens = make(model), torch.randint(0, 128, (1, 300))
    model(tokens, **cache_argument(cache))

    def step() -> object:
        return model(tokens[:, :1], **cache_argument(cache))

    for _ in range(3):
        step()
    return step


def operations(layers: int, make: Make) -> list[str]:
    step = step_within_a_page(layers, make)
    with Operations() as counted:
        step()
    return counted.names


def calls(layers: int, make: Make) -> int:
    step, number = step_within_a_page(layers, make), 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal number
        number += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(before)
    return number


def per_layer(cost: Callable[[int, Make], int], make: Make) -> float:
    return (cost(6, make) - cost(2, make)) / 4


@pytest.mark.parametrize(
    ("cost", "most"),
    [(calls, MOST_CALLS), (lambda layers, make: len(operations(layers, make)), MOST_OPERATIONS)],
    ids=["calls", "operations"],
)
@torch.no_grad()
def test_a_step_costs_little_more_than_with_a_dynamic_cache(cost: Callable[[int, Make], int], most: int) -> None:
    assert per_layer(cost, with_pikv) - per_layer(cost, with_dynamic) <= most


@torch.no_grad()
def test_a_step_within_a_page_waits_for_no_device() -> None:
    # The model itself may.
    def waits(make: Make) -> list[str]:
        return sorted(name for name in operations(2, make) if name in SYNCHRONISING)

    assert waits(with_pikv) == waits(with_dynamic)
