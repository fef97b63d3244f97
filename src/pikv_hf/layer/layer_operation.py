"""How every operation of a layer runs: on ordinary tensors, whatever mode of torch its caller is in."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def layer_operation(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Run a function without autograd, inference mode and autocast, whoever calls it.

    What a layer keeps outlives the call that it came with, and later calls write into it: pages, counts, bounds, shares
    of attention. Made in inference mode they could be written in inference mode alone, made while autograd records they
    would keep its graph, and autocast would round what is computed of them. So whatever makes, reads or changes what a
    layer stores is an operation. What a caller may want to differentiate, or has autocast round, is computed outside.

    One that calls another costs little more: 0.4 microseconds where no such mode is on, as in `generate`, else 3.
    """

    @functools.wraps(function)
    def operation(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if not (torch.is_grad_enabled() or torch.is_inference_mode_enabled() or torch._C._is_any_autocast_enabled()):
            return function(*args, **kwargs)
        # torch.autocast(enabled=False) is for one kind of device, of which a layer may have several.
        with torch.inference_mode(False), torch._C._DisableAutocast():
            # Until the block ends: inference_mode restores it too, for less than another context costs.
            torch.set_grad_enabled(False)
            return function(*args, **kwargs)

    return operation
