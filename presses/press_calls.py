"""What a press's block has seen: one that the model went through and that found no cache is an error."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn

from pikv_hf.common.transformers_release import CACHE_ARGUMENT, cache_of_call
from pikv_hf.integration.model_modules import unwrapped


@contextmanager
def finds_a_cache(press: str, model: Any, modules: Iterable[nn.Module]) -> Generator[None, None, None]:
    """Expect that one of these attention modules is called with a cache within the block, if the model is called.

    A block in which the model is not called has nothing to press, and one that fails has its own error.

    Raises
    ------
    RuntimeError
        At the end of the block.
    """
    calls = {"model": 0, "attention": 0, "cache": 0}

    def model_called(*_: Any) -> None:
        calls["model"] += 1

    def attention_called(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls["attention"] += 1
        calls["cache"] += cache_of_call(kwargs) is not None

    whole = unwrapped(model)
    callers = {id(module): module for module in (whole, getattr(whole, "base_model", whole))}.values()
    handles = [module.register_forward_pre_hook(model_called) for module in callers]
    handles += [module.register_forward_pre_hook(attention_called, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if calls["model"] and not calls["cache"]:
        raise RuntimeError(
            f"{press} had nothing to press: of {calls['attention']} attention calls within its block none had a cache "
            f"by name; call the model with {CACHE_ARGUMENT}= and without use_cache=False"
        )
