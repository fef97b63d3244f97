"""Saving a cache to a file, or one per process, and loading it again, with the model it belongs to checked.

The file is in the safetensors format. `__metadata__` holds the layout version, the options, the model's fingerprint and
a description of each layer, as JSON; the tensors are those of the pages in use. Nothing in it is ever executed.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..config import PiKVConfig
from ..distributed.device_layout import Devices, PartLayout, attention_device
from ..distributed.process_exchange import Exchange
from ..integration.attachment import Attachment
from ..integration.model_modules import find_attention_modules
from ..layer.layer_operation import layer_operation, ordinary_mode
from ..version import __version__
from .format import FORMAT, READ_VERSIONS, VERSION
from .layer_loader import LayerLoader, PagedLayerLoader, layer_loader
from .layer_writer import describe_layer
from .model_adapters import Adapter, difference
from .model_fingerprint import Fingerprint
from .older_versions import OLDER, upgraded, upgraded_model
from .rank_files import check_is_own, check_same_save, exchange_of, file_to_load, in_step, save_in_step
from .saved_options import loaded_options
from .tensor_file import CacheFileError, TensorFile
from .tensor_writer import Group, write_tensors

#: Options that may be others when a cache is loaded: none of them says how stored tokens are laid out.
CHANGEABLE = (
    "routing",
    "max_pages",
    "coverage",
    "tier_cost",
    "budget",
    "budget_scope",
    "scheduler",
    "tiers",
    "tier_directory",
    "error_budget",
)


class SavableCache(Protocol):
    """What saving reads of a cache, and loading of the new one."""

    layers: list[Any]
    attachment: Attachment | None
    filled_under: list[Adapter] | None
    model_config: Any
    pikv_config: PiKVConfig
    lock: AbstractContextManager[Any]

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Return how many positions it has seen."""


_Cache = TypeVar("_Cache", bound=SavableCache)


@layer_operation
def save_cache(cache: SavableCache, path: str | os.PathLike[str]) -> None:
    """Write a cache to a file, or to one for each of several processes. See :meth:`PiKVCache.save`."""
    if not os.fspath(path):
        raise ValueError(f"save() needs the name of a file, got {path!r}")
    model = None if cache.attachment is None else cache.attachment.model
    if cache.attachment is not None and model is None:
        raise ValueError("this cache has outlived its model, and a saved one is checked against its model")
    fingerprint = Fingerprint.of_config(cache.model_config) if model is None else _fingerprint(cache, model)
    exchange = exchange_of(cache.layers)
    if exchange is None:
        _write(cache, fingerprint, Path(path), {})
    else:
        device = attention_device(None, model)
        save_in_step(exchange, device, Path(path), lambda own, more: _write(cache, fingerprint, own, more))


def _fingerprint(cache: SavableCache, model: Any) -> Fingerprint:
    """Return the fingerprint of a cache's model.

    Raises
    ------
    ValueError
        If other adapters are in use than when the cache was filled.
    """
    fingerprint = Fingerprint.of(model)
    filled, known = bool(cache.get_seq_length()), cache.filled_under
    if filled and known is not None and (differences := difference(known, fingerprint.adapters or [])):
        raise ValueError(f"this cache was filled by another model: {differences}; save it as it was filled")
    return fingerprint


def _write(cache: SavableCache, fingerprint: Fingerprint, path: Path, more: dict[str, str]) -> None:
    """Write what this process has of a cache, with `more` metadata."""
    layers: list[dict[str, Any]] = []
    groups: list[Group] = []
    for index, layer in enumerate(cache.layers):
        description, written = describe_layer(index, layer)
        layers.append(description)
        groups += written
    metadata = {
        "format": FORMAT,
        "layout": VERSION,
        "pikv_hf": __version__,
        "config": cache.pikv_config.to_json(),
        "model": json.dumps(fingerprint.to_dict()),
        "layers": json.dumps(layers),
        **more,
    }
    write_tensors(path, metadata, groups)


def load_cache(
    make: Callable[[PiKVConfig, bool], _Cache],
    path: str | os.PathLike[str],
    model: Any,
    spread: Devices | PartLayout | None,
    options: dict[str, Any],
) -> _Cache:
    """Return the cache that a file holds. See :meth:`PiKVCache.load`.

    Parameters
    ----------
    make : callable
        Returns an empty cache of these options, in the places that `spread` names: for the model, which is then
        attached, or for its config alone.
    path : path-like
        The file.
    model : PreTrainedModel or PreTrainedConfig
        The model that it should be of, or the config of one.
    spread : Devices, PartLayout or None
        Where its parts are to be.
    options : dict
        Those that are to be others than they were.
    """
    exchange = spread.exchange if isinstance(spread, PartLayout) else None
    if exchange is not None and exchange.ranks == 1:
        exchange = None
    device = _device(None, model)
    with ordinary_mode(), ExitStack() as stack:
        saved = _CacheLoader(Path(path), options)
        # Whatever goes wrong in one of several processes, none of them goes on alone.
        in_step(exchange, device, "load the cache", lambda: saved.read(stack, model, spread, exchange))
        if exchange is not None:
            check_same_save(saved.path, saved.save, exchange, device)
        return in_step(exchange, device, "load the cache", lambda: saved.build(make, model))


class _CacheLoader:
    """Checks a whole file, and makes the cache that it holds.

    Parameters
    ----------
    path : Path
        What it was saved to.
    options : dict
        Those that are to be others.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path, self._options = path, options
        self.save = ""

    def read(
        self, stack: ExitStack, model: Any, spread: Devices | PartLayout | None, exchange: Exchange | None
    ) -> None:
        """Open the file, for as long as `stack` lasts, and check everything in it; nothing is built yet."""
        self.path = path = file_to_load(self.path, exchange)
        file = stack.enter_context(TensorFile(path, {"format": [FORMAT], "layout": READ_VERSIONS}))
        with _file_in_errors(path):
            saved_config = loaded_options(json.loads(file.metadata["config"]), {})
            saved_model = _saved_model(file)
            self.save = check_is_own(file.metadata, exchange)
        _require_changeable(saved_config, self._options)
        self.config = loaded_options(saved_config.to_dict(), self._options)
        self._has_model, self._adapters = saved_model.weights is not None, saved_model.adapters or []
        _require_same_model(path, saved_model, model, spread)
        file.verify()
        with _file_in_errors(path):
            layers = json.loads(file.metadata["layers"])
            if file.metadata["layout"] in OLDER:
                layers, names = upgraded(file.metadata["layout"], layers, file.specs)
                file.rename(names)
            self._layers = _read_layers(file, layers, self._options)
            _require_as_many_parts(self._layers, spread)
        _require_whole_shards(self._layers, saved_config, self.config)

    def build(self, make: Callable[[PiKVConfig, bool], _Cache], model: Any) -> _Cache:
        """Make the cache and fill its layers."""
        cache = make(self.config, self._has_model)
        cache.filled_under = self._adapters
        with _file_in_errors(self.path):
            _require_fitting(cache, self._layers)
        modules = {} if isinstance(model, PreTrainedConfig) else find_attention_modules(model)
        for index, (saved, layer) in enumerate(zip(self._layers, cache.layers, strict=True)):
            saved.restore(layer, _device(modules[index][1] if index in modules else None, model))
        return cache


def _device(module: nn.Module | None, model: Any) -> torch.device:
    """Return where a layer's attention computes; where new tensors are made if only a config is known."""
    return torch.get_default_device() if isinstance(model, PreTrainedConfig) else attention_device(module, model)


def _saved_model(file: TensorFile) -> Fingerprint:
    saved = json.loads(file.metadata["model"])
    return Fingerprint.read(upgraded_model(saved) if file.metadata["layout"] in OLDER else saved)


def _require_same_model(path: Path, saved: Fingerprint, model: Any, spread: Devices | PartLayout | None) -> None:
    """Raise unless a model, or the config of one, is that which a cache was saved with."""
    if saved.weights is None and spread is not None:
        raise CacheFileError(f"{path} was made from a config alone: such a cache is in one part, so give no devices")
    if saved.weights is not None and isinstance(model, PreTrainedConfig):
        raise CacheFileError(
            f"{path} was saved with a model, whose weights are compared: load it with the model, got only a "
            f"{type(model).__name__}"
        )
    config = model if isinstance(model, PreTrainedConfig) else model.config
    is_older = saved.adapters is None
    here = Fingerprint.of_config(config) if saved.weights is None else Fingerprint.of(model, as_registered=is_older)
    if differences := saved.differences(here):
        raise CacheFileError(f"{path} was saved with another model: {differences}")


@contextmanager
def _file_in_errors(path: Path) -> Iterator[None]:
    """Name the file in errors about what it holds, whatever they are that a description without sense has led to."""
    try:
        yield
    except CacheFileError as error:
        raise CacheFileError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CacheFileError(f"{path}: its description of the cache makes no sense: {error!r}") from error


@contextmanager
def _layer_in_errors(index: int) -> Iterator[None]:
    try:
        yield
    except CacheFileError as error:
        raise CacheFileError(f"layer {index}: {error}") from None


def _require_changeable(config: PiKVConfig, options: dict[str, Any]) -> None:
    saved = config.to_dict()
    for name, value in options.items():
        if name in saved and name not in CHANGEABLE and value != saved[name]:
            raise ValueError(
                f"{name}={value!r} was asked for, but the cache was saved with {saved[name]!r}, and its pages are laid "
                f"out for that; what may be chosen anew: {', '.join(CHANGEABLE)}"
            )


def _read_layers(file: TensorFile, descriptions: list[dict[str, Any]], options: dict[str, Any]) -> list[LayerLoader]:
    """Return the loaders of all layers, which have checked what the file says."""
    layers: list[LayerLoader] = []
    known: set[str] = set()
    for index, description in enumerate(descriptions):
        with _layer_in_errors(index):
            layer = layer_loader(index, description, file, options)
            for name, spec in layer.specs().items():
                if (found := file.specs.get(name)) != spec:
                    raise CacheFileError(f"tensor {name!r} is {found}, expected {spec}")
                known.add(name)
            layer.check()
        layers.append(layer)
    if unknown := sorted(file.specs.keys() - known):
        raise CacheFileError(f"{len(unknown)} tensors belong to no layer, such as {unknown[0]!r}")
    return layers


def _require_fitting(cache: SavableCache, layers: list[LayerLoader]) -> None:
    if len(layers) != len(cache.layers):
        raise CacheFileError(f"it has {len(layers)} layers, the model {len(cache.layers)}")
    for index, (saved, layer) in enumerate(zip(layers, cache.layers, strict=True)):
        with _layer_in_errors(index):
            saved.check_fits(layer)


def _require_as_many_parts(layers: list[LayerLoader], spread: Devices | PartLayout | None) -> None:
    """Raise unless a cache laid out like this has as many parts as a file; devices may be others."""
    saved_parts = [layer.parts for layer in layers if isinstance(layer, PagedLayerLoader)]
    names = list(dict.fromkeys(name for each in saved_parts for name in each.devices if name))
    saved = sorted({each.total for each in saved_parts})
    there = f"it was saved in {' and '.join(map(str, saved))} {'part' if saved == [1] else 'parts'}"
    if isinstance(spread, PartLayout):
        numbers = [location.number for location in spread.locations]
        if any((each.total, each.numbers) != (spread.parts, numbers) for each in saved_parts):
            raise CacheFileError(f"{there} of each layer, by one process; {spread.parts} processes are to load it")
        return
    if spread is None:
        if any(each.total > 1 for each in saved_parts):
            raise CacheFileError(
                f"{there} of each layer, on the devices {', '.join(names)}; say where to load it: "
                f"PiKVCache.load(path, model, devices=[...]) with {len(names)} devices"
            )
        return
    # A layer whose attention is on none of the devices has its window there, in a part more.
    given = len(spread.names)
    if any(each.total not in (given, given + 1) for each in saved_parts):
        on = f" on the devices {', '.join(names)}" if names else ""
        raise CacheFileError(f"{there} of each layer{on}; {given} devices were given: {', '.join(spread.names)}")


def _require_whole_shards(layers: list[LayerLoader], saved: PiKVConfig, config: PiKVConfig) -> None:
    is_spread = any(isinstance(layer, PagedLayerLoader) and layer.parts.total > 1 for layer in layers)
    if is_spread and config.budget_scope == "shard" != saved.budget_scope:
        raise ValueError(
            f"budget_scope='shard' was asked for, but the cache was saved with {saved.budget_scope!r}, and its shards "
            "are divided between several parts"
        )
