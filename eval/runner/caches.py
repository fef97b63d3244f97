"""Make caches by name: `dynamic`, `quantized:quanto:4`, `pikv`, `pikv:page_size=64,num_shards=4`.

Where a `pikv` cache keeps its shards is said alike: `pikv:devices=cuda:0+cuda:1`, `pikv:process_group=world`.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import yaml
from transformers import DynamicCache, QuantizedCache

from pikv_hf import PiKVCache, PiKVConfig, attach
from pikv_hf.common.extras import install_command
from pikv_hf.common.suggest import did_you_mean
from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.integration.model_modules import find_expert_routers
from pikv_hf.presses.press_base import KVPRESS  # noqa: F401  It wraps the attention functions it finds: before ours.

#: Backends of transformers' QuantizedCache: the module each needs, what installs it, and the widths it knows.
_BACKENDS = {
    "quanto": ("optimum.quanto", install_command("quanto"), (2, 4)),
    "hqq": ("hqq", "pip install hqq", (1, 2, 3, 4, 8)),
}

#: Arguments of `PiKVCache.for_model` beside the options of its configuration.
_WHERE = ("devices", "process_group", "timeout")


@dataclass(frozen=True, slots=True)
class CacheFactory:
    """Makes a fresh cache for every sample.

    Attributes
    ----------
    spec : str
        As the user wrote it.
    label : str
        For tables and plots.
    make : callable
        From a model to a new, empty cache.
    prepare : callable
        From a model to a context manager in which the cache works; it leaves the model as it was.
    shared : bool
        Whether all processes of the run keep one cache together, so that each of them reads every sample.
    ours : bool
        Whether it is this project's, and not one of transformers or the user.
    """

    spec: str
    label: str
    make: Callable[[Any], Any]
    prepare: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    shared: bool = False
    ours: bool = False


def cache_factory(spec: str) -> CacheFactory:
    """Prepare a cache by name.

    Raises
    ------
    InputError
        For an unknown name or option (with a suggestion), a value out of range, or a package that is not installed.
    """
    name, _, rest = spec.partition(":")
    if name not in _FACTORIES:
        raise InputError(f"unknown cache {name!r}{did_you_mean(name, _FACTORIES)} (known: {', '.join(_FACTORIES)})")
    return _FACTORIES[name](spec, rest)


def _dynamic(spec: str, rest: str) -> CacheFactory:
    if rest:
        raise InputError(f"the dynamic cache has no options, got {rest!r}")
    return CacheFactory(spec, "DynamicCache", lambda model: DynamicCache(config=model.config))


def _quantized(spec: str, rest: str) -> CacheFactory:
    backend, _, width = (rest or "quanto:4").partition(":")
    if backend not in _BACKENDS:
        hint = did_you_mean(backend, _BACKENDS)
        raise InputError(f"unknown backend {backend!r}{hint} in {spec!r} (known: {', '.join(_BACKENDS)})")
    module, install, widths = _BACKENDS[backend]
    if width not in map(str, widths):
        raise InputError(f"{backend} quantises to {', '.join(map(str, widths))} bits, got {width!r} in {spec!r}")
    if not _installed(module):
        raise InputError(f"the cache {spec!r} needs {module}: {install}")

    def make(model: Any) -> Any:
        # kvpress and the backends write to all layers alike; a config with sliding layers would mix the kinds.
        return QuantizedCache(backend=backend, config=model.config, nbits=int(width))

    return CacheFactory(spec, f"QuantizedCache {backend} {width} bit", make)


def _pikv(spec: str, rest: str) -> CacheFactory:
    with user_input(f"invalid cache {spec!r}"):
        options = dict(_option(part, spec) for part in rest.split(",") if part.strip())
        where = {name: options[name] for name in _WHERE if name in options}
        config = PiKVConfig.from_dict({name: value for name, value in options.items() if name not in where})
    label = " ".join(["PiKVCache", *(f"{name}={value}" for name, value in options.items())])
    if isinstance(devices := where.get("devices"), str) and devices != "auto":
        where["devices"] = devices.split("+")

    def make(model: Any) -> PiKVCache:
        with user_input(f"cannot make cache {spec!r}"):
            return PiKVCache.for_model(model, config, **where)

    def prepare(model: Any) -> AbstractContextManager[Any]:
        with user_input(f"cannot use cache {spec!r}"):
            return attach(model, config.placement or "expert")

    return CacheFactory(spec, label, make, prepare, shared="process_group" in where, ours=True)


def _option(part: str, spec: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise InputError(f"expected option=value in {spec!r}, got {part!r}")
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(
            f"cannot read the value of {name.strip()} in {spec!r}: {' '.join(str(error).split())}"
        ) from None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


_FACTORIES: dict[str, Callable[[str, str], CacheFactory]] = {
    "dynamic": _dynamic,
    "quantized": _quantized,
    "pikv": _pikv,
}


def store_options(model: Any, codec: str) -> dict[str, Any]:
    """Return options of a store's caches: a codec of keys and values, and placement by experts where there are any."""
    placement = "expert" if find_expert_routers(model) else "hash"
    return {"key_codec": codec, "value_codec": codec, "placement": placement}
