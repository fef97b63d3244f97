"""Saving a cache to one file and loading it again, with the model it belongs to checked.

The file is in the safetensors format. `__metadata__` holds the layout version, the options, the model's fingerprint and
a description of each layer, as JSON; the tensors are those of the pages in use. Nothing in it is ever executed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import PiKVConfig
from .fingerprint import Fingerprint
from .layout import attention_device
from .loaded_layer import SavedPaged, SavedSliding
from .saved_layer import describe_layer
from .tensor_file import CacheFileError, Group, TensorFile, write_tensors
from .version import __version__

if TYPE_CHECKING:
    from .cache import PiKVCache

#: What the file is; the layout changes whenever an older release could misread a file.
FORMAT, LAYOUT = "pikv-cache", "1"

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


@torch.no_grad()
def save_cache(cache: "PiKVCache", path: str | os.PathLike[str]) -> None:
    """Write a cache to a file. See :meth:`PiKVCache.save`."""
    model = None if cache.attachment is None else cache.attachment.model
    if model is None:
        why = "was made from a config alone" if cache.attachment is None else "has outlived its model"
        raise ValueError(f"this cache {why}, and a saved one is checked against its model; use PiKVCache.for_model")
    layers: list[dict[str, Any]] = []
    groups: list[Group] = []
    for index, layer in enumerate(cache.layers):
        description, written = describe_layer(index, layer)
        layers.append(description)
        groups += written
    fingerprint = Fingerprint.of(model)
    metadata = {
        "format": FORMAT,
        "layout": LAYOUT,
        "pikv_hf": __version__,
        "config": cache.pikv_config.to_json(),
        "model": json.dumps(fingerprint.to_dict()),
        "layers": json.dumps(layers),
    }
    write_tensors(Path(path), metadata, groups)


@torch.no_grad()
def load_cache(kind: "type[PiKVCache]", path: str | os.PathLike[str], model: Any, **options: Any) -> "PiKVCache":
    """Return the cache that a file holds. See :meth:`PiKVCache.load`."""
    path = Path(path)
    with TensorFile(path, {"format": FORMAT, "layout": LAYOUT}) as file:
        with _described(path):
            saved_config = PiKVConfig.from_json(file.metadata["config"])
            saved_model = Fingerprint(**json.loads(file.metadata["model"]))
        _require_changeable(saved_config, options)
        config = PiKVConfig.from_dict({**saved_config.to_dict(), **options})
        if differences := saved_model.differences(Fingerprint.of(model)):
            raise CacheFileError(f"{path} was saved with another model: {differences}")
        file.verify()
        with _described(path):
            layers = _read_layers(file, json.loads(file.metadata["layers"]), options)
        cache = kind.for_model(model, config)
        with _described(path):
            _require_fitting(cache, layers)
        assert cache.attachment is not None
        modules = cache.attachment.attention_modules()
        for index, (saved, layer) in enumerate(zip(layers, cache.layers, strict=True)):
            saved.restore(layer, attention_device(modules.get(index), model))
    return cache


@contextmanager
def _described(path: Path) -> Iterator[None]:
    """Name the file in errors about what it holds, whatever they are that a description without sense has led to."""
    try:
        yield
    except CacheFileError as error:
        raise CacheFileError(f"{path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CacheFileError(f"{path}: its description of the cache makes no sense: {error!r}") from error


@contextmanager
def _of_layer(index: int) -> Iterator[None]:
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


def _read_layers(
    file: TensorFile, descriptions: list[dict[str, Any]], options: dict[str, Any]
) -> list[SavedPaged | SavedSliding]:
    """Return the layers, checked."""
    layers: list[SavedPaged | SavedSliding] = []
    known: set[str] = set()
    for index, description in enumerate(descriptions):
        with _of_layer(index):
            layer: SavedPaged | SavedSliding
            if description["kind"] == "sliding":
                layer = SavedSliding(index, description, file)
            else:
                layer = SavedPaged(index, description, file, options)
            for name, spec in layer.specs().items():
                if (found := file.specs.get(name)) != spec:
                    raise CacheFileError(f"tensor {name!r} is {found}, expected {spec}")
                known.add(name)
            layer.check()
        layers.append(layer)
    if unknown := sorted(file.specs.keys() - known):
        raise CacheFileError(f"{len(unknown)} tensors belong to no layer, such as {unknown[0]!r}")
    return layers


def _require_fitting(cache: "PiKVCache", layers: list[SavedPaged | SavedSliding]) -> None:
    if len(layers) != len(cache.layers):
        raise CacheFileError(f"it has {len(layers)} layers, the model {len(cache.layers)}")
    for index, (saved, layer) in enumerate(zip(layers, cache.layers, strict=True)):
        with _of_layer(index):
            saved.check_fits(layer)
