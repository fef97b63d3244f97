"""The caches that the demo compares: how each is made, filled with the text and copied for a question."""

import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig

#: What PiKVPress may keep, as a share of the bytes that `DynamicCache` takes for the text in the model's dtype.
PRESS_SHARE = 1 / 16


@dataclasses.dataclass(frozen=True, slots=True)
class CacheKind:
    """How to make a cache, read the text into it, and copy it for one more question.

    Attributes
    ----------
    name : str
        As the tables call it.
    make : callable
        Returns an empty cache.
    copy : callable
        Returns a copy of a cache that can be written to.
    reading : callable
        Returns the context manager in which the text is read. Questions and answers are outside of it.
    """

    name: str
    make: Callable[[], Any]
    copy: Callable[[Any], Any]
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext


def dynamic_cache(model: Any) -> CacheKind:
    """transformers' default cache, copied whole for each question."""
    return CacheKind("DynamicCache", lambda: DynamicCache(config=model.config), copy.deepcopy)


def pikv_cache(model: Any, config: PiKVConfig, devices: tuple[str, ...] = ()) -> CacheKind:
    """PiKV's cache, on these devices if any are named, forked for each question."""
    return CacheKind("PiKVCache", lambda: make_pikv(model, config, devices), PiKVCache.fork)


def int4_cache(model: Any, config: PiKVConfig, devices: tuple[str, ...] = ()) -> CacheKind:
    """PiKV's cache with keys and values in int4, but for sinks, recent window and pages that are not full."""
    config = dataclasses.replace(config, key_codec="int4", value_codec="int4")
    return dataclasses.replace(pikv_cache(model, config, devices), name="int4")


def pressed_cache(model: Any, config: PiKVConfig, devices: tuple[str, ...] = ()) -> CacheKind:
    """PiKV's cache, of which PiKVPress leaves `PRESS_SHARE` of the bytes when the text has been read."""
    # Not at the top of the file: it imports kvpress, which wraps transformers' attention functions, where there is one,
    # and that slows the baseline down.
    from pikv_hf.presses import PiKVPress

    return dataclasses.replace(
        pikv_cache(model, config, devices),
        name="PiKVPress",
        reading=lambda: PiKVPress(compression_ratio=1 - PRESS_SHARE)(model),
    )


def make_pikv(model: Any, config: PiKVConfig, devices: tuple[str, ...]) -> PiKVCache:
    """Return a cache whose shards are on these devices; `("auto",)` and `()` as in `PiKVCache.for_model`."""
    where = "auto" if devices == ("auto",) else list(devices)
    return PiKVCache.for_model(model, config, devices=where if devices else None)
