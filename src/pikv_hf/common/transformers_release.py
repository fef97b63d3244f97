"""How releases of transformers differ in what they ask of a cache: the one place that looks at the version.

From 5.24 on models, their outputs and `generate` call a cache `cache`, before that `past_key_values`.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version

from .user_line import user_stacklevel

#: The newest release that this project's tests run with.
NEWEST_TESTED = "5.24.0"

#: The version that is installed.
INSTALLED: str = transformers.__version__

_installed = Version(INSTALLED)
_NAMES = ("cache", "past_key_values")

#: The argument by which models take a cache, and the field of their outputs that has it.
CACHE_ARGUMENT = _NAMES[0] if _installed >= Version("5.24.0.dev0") else _NAMES[1]

#: What it was called before 5.24: the name that kvpress and other older code knows.
OLD_CACHE_ARGUMENT = _NAMES[1]

#: Under which arguments modules of transformers, and of older code for it, take a cache.
CACHE_ARGUMENTS = (*_NAMES, "past_key_value", "cache_params", "layer_past")

#: Up to 5.17 `crop(0)` keeps nothing, from 5.18 on it removes nothing.
CROP_ZERO_REMOVES_NOTHING = _installed >= Version("5.18.0.dev0")


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return the argument that gives a model this cache: `model(ids, **cache_argument(cache))`."""
    return {CACHE_ARGUMENT: cache}


def cache_of_call(arguments: Mapping[str, Any]) -> Any:
    """Return the cache that a model or module is called with by name, None if with none."""
    for name in _NAMES:
        if (cache := arguments.get(name)) is not None:
            return cache
    return None


def with_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return the arguments of a call with another cache, under the name that the call has for it, or that of today."""
    names = [name for name in _NAMES if name in arguments]
    others = {name: value for name, value in arguments.items() if name not in names}
    return {**others, names[0] if len(names) == 1 else CACHE_ARGUMENT: cache}


def config_of_layer(config: Any, index: int) -> Any:
    """Return the config of one decoder layer: newer releases have some whose layers differ in more than their type."""
    each = getattr(config, "per_layer_config", None)
    return config if each is None else each[index]


def arguments_of_layers() -> set[str]:
    """Return what decoder layers are called with, by name, and hand on to attention: Llama's stand for all."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    return set(inspect.signature(LlamaDecoderLayer.forward).parameters)


def queries_of_mask(arguments: Mapping[str, Any]) -> tuple[int, Any]:
    """Return for how many queries a mask function is called, and the position of the last: not always the last one.

    Older releases call it with `cache_position`, newer ones with `q_length` and `q_offset`.
    """
    if isinstance(positions := arguments.get("cache_position"), torch.Tensor):
        return positions.shape[0], positions[-1]
    return arguments["q_length"], arguments.get("q_offset", 0) + arguments["q_length"] - 1


@functools.cache
def warn_if_newer() -> None:
    """Warn, once in a process, of a release that is newer than the newest tested one."""
    if _installed > Version(NEWEST_TESTED):
        warnings.warn(
            f"pikv_hf was tested with transformers up to {NEWEST_TESTED}, and {INSTALLED} is installed; "
            "compare with DynamicCache before you rely on it. (Said once.)",
            stacklevel=user_stacklevel(),
        )
