"""A stand-in for an attached model of one routed layer, and the sizes of its heads."""

from types import SimpleNamespace
from typing import Any

import torch

from pikv_hf.layer.layer import PiKVLayer

HEADS, GROUPS, KEY_DIM, VALUE_DIM, EXPERTS = 2, 3, 8, 6, 5
SCALE = 0.7
ATTENTION = torch.nn.Module()
ATTENTION.num_key_value_groups = GROUPS


class FakeAttachment:
    """An attached model of one routed layer; the test plays the router."""

    def __init__(self) -> None:
        self.expert_routers = {0: SimpleNamespace(num_experts=EXPERTS)}

    @property
    def latents(self) -> Any:
        return SimpleNamespace(expansions={})

    def is_active(self, layer_idx: int) -> bool:
        return True

    def changes_keys(self, layer_idx: int) -> bool:
        return False

    def absorbs(self, layer_idx: int) -> bool:
        return False

    def caches_latents(self, layer_idx: int) -> bool:
        return False

    def slides(self, layer_idx: int) -> bool:
        return True

    def attention_of(self, layer_idx: int) -> torch.nn.Module:
        return ATTENTION

    def refer(self, layer: PiKVLayer) -> None:
        raise AssertionError("it has no latents")

    def implementation(self, layer_idx: int) -> str:
        return "pikv"

    def is_training(self, layer_idx: int) -> bool:
        return False

    def check_reads_caches(self, layer_idx: int) -> None:
        pass

    def owns(self, module: Any) -> bool:
        return True

    def takes_update(self, layer: PiKVLayer) -> bool:
        return True

    def expect(self, layer: PiKVLayer) -> None:
        pass

    def forget(self, layer: PiKVLayer) -> None:
        pass

    def reads(self, layer: PiKVLayer, prompt: bool) -> None:
        pass

    def take_marks(self, layer: PiKVLayer) -> None:
        return None
