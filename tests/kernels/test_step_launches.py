"""What a decoding step launches on a GPU, and that it waits for nothing: counted with the kernels interpreted."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from triton_cases import BACKEND, GPU

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.integration import attention_function
from pikv_hf.kernels import dispatch
from pikv_hf.layer import layer_edits
from pikv_hf.layer.layer import PiKVLayer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(GPU, reason="the operations of the interpreter's tensors, which stand for those of a GPU"),
]

#: Operations that launch nothing: they make a view, or memory that nothing is written to.
NO_LAUNCH = {
    *(
        "view",
        "_unsafe_view",
        "slice",
        "select",
        "transpose",
        "unsqueeze",
        "squeeze",
        "permute",
        "expand",
        "as_strided",
    ),
    *("split", "unbind", "alias", "detach", "t", "empty", "empty_like", "empty_strided", "new_empty"),
}
#: Operations by which the host waits for a device.
WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "unique_dim"}
#: Calls by which it reads a device's memory, or copies to it.
READING = (
    (torch.Tensor, ("numpy", "tolist", "cpu", "item", "__bool__")),
    (torch, ("from_numpy", "tensor", "as_tensor")),
)
STEPS = 3


class Launches(TorchDispatchMode):
    """Notes what is launched in each phase of a step: Triton's kernels, and torch's operations but views."""

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[str] = []
        self.names: dict[str, list[str]] = defaultdict(list)
        self.interpreting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.interpreting:
            assert name not in WAITING or not self.phases, f"{name} in {self.phases}"
            if name not in NO_LAUNCH:
                self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        if self.phases:
            self.names[self.phases[-1]].append(name)

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.phases.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.phases.pop()

        return run

    def of_kernels(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        def noted(kernel: Any, grid: Any) -> Callable[..., None]:
            def run(*args: Any, **kwargs: Any) -> None:
                self.note(kernel.fn.__name__)
                self.interpreting = True
                try:
                    launch(kernel, grid)(*args, **kwargs)
                finally:
                    self.interpreting = False

            return run

        return noted

    def of_reading(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            assert self.interpreting or not self.phases, f"{name} in {self.phases}"
            return function(*args, **kwargs)

        return refused


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Say what is launched, lists being long enough to be read in parts."""
    counted = Launches()
    reading = dispatch.load("page_lists", BACKEND)
    for module in (reading, dispatch.load("paged_decode_attention", BACKEND)):
        monkeypatch.setattr(module, "MIN_PAGES", 2)
    monkeypatch.setattr(reading, "processors", lambda device: 40)
    kernel = type(reading.listed_kernel)
    monkeypatch.setattr(kernel, "__getitem__", counted.of_kernels(kernel.__getitem__))
    monkeypatch.setattr(PiKVLayer, "update", counted.within("update", PiKVLayer.update))
    # Not the function that transformers calls: where kvpress was imported, that is a wrapper of an earlier one.
    attend = counted.within("attention", attention_function._attend_layer)
    monkeypatch.setattr(attention_function, "_attend_layer", attend)
    monkeypatch.setattr(layer_edits, "record_experts", counted.within("experts", layer_edits.record_experts))
    return counted


def decode(options: dict[str, Any], widths: torch.Tensor | None, launches: Launches, patch: pytest.MonkeyPatch) -> None:
    """Take steps within a page of a cache of two layers, in half precision."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "head_dim": 32, "vocab_size": 128}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=2, **sizes, **experts)).eval().half()
    patch.setenv("PIKV_KERNELS", "torch")
    cache = PiKVCache.for_model(model, page_size=16, recent_window=32, num_shards=1, **options)
    tokens = torch.randint(0, 128, (2, 200))
    model(tokens, **cache_argument(cache))
    if widths is not None:
        for layer, chosen in zip(cache.layers, widths, strict=True):
            layer.keep(chosen)
    patch.setenv("PIKV_KERNELS", BACKEND)
    # What is uploaded is uploaded where a page begins.
    for _ in range(2):
        model(tokens[:, :1], **cache_argument(cache))
    for owner, names in READING:
        for name in names:
            patch.setattr(owner, name, launches.of_reading(name, getattr(owner, name)))
    launches.names.clear()
    with launches:
        for step in range(STEPS):
            model(tokens[:, step : step + 1], **cache_argument(cache))


@pytest.mark.parametrize("codec", ["none", "int8", "int4", "int2", "fp8", "int8/int4", "widths"])
@torch.no_grad()
def test_a_layers_step_takes_three_launches(codec: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes the token, one attends to the pages of all pools, one merges; none waits within a page."""
    keys, _, values = codec.partition("/")
    options, widths = {"key_codec": keys, "value_codec": values or keys}, None
    if codec == "widths":
        # Heads then keep other tokens, in four pools.
        options, widths = {}, torch.tensor([0, 2, 4, 8, 16])[torch.randint(0, 5, (2, 2, 2, 200))]
    decode(options, widths, launches, monkeypatch)
    times = 2 * STEPS
    assert launches.names["update"] == ["_append_newest_kernel"] * times
    # The model is handed its own dtype.
    assert launches.names["attention"] == ["listed_kernel", "_merge_kernel", "_to_copy"] * times
    # Beside the attention: the primary experts of the token, int16, and where heads keep other tokens one for each.
    of_lanes = [] if widths is None else ["clone"]
    assert launches.names["experts"] == ["_to_copy", *of_lanes, "index_copy_"] * times
