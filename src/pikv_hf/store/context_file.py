"""One file of a store of contexts: the tokens of a context behind those of another one, and their K/V.

The format is safetensors with checksums, as of saved caches. The metadata say which tokens come before (`start`, and
the file `parent` that has them); tensors are `tokens` `(n,)`, and of each paged layer `keys`, `values` and `experts` of
these n tokens, decoded. Layers that are not paged are whole in each file.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ..cache import PiKVCache
from ..layer.layer import PiKVLayer
from ..layer.token_segments import Segment, append_segment, segment_of
from ..serialization.layer_loader import layer_loader
from ..serialization.layer_writer import describe_layer
from ..serialization.tensor_file import CacheFileError, Spec, TensorFile, require
from ..serialization.tensor_writer import Group, write_tensors
from .radix_tree import Tokens

FORMAT, LAYOUT = "pikv context", "1"
NAME = re.compile(r"ctx-[0-9a-f]{32}\.safetensors")
#: Where the attention of a layer computes, by its index.
DeviceOf = Callable[[int], torch.device]
_PARTS = ("keys", "values", "experts")


def name_of(tokens: Tokens) -> str:
    """Return the name of the file of a context: the same for the same tokens, whoever writes it."""
    return f"ctx-{hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()}.safetensors"


@dataclasses.dataclass(slots=True)
class ContextFile:
    """What is known of a file without reading its K/V.

    Attributes
    ----------
    path : Path
        Where it is.
    start, length : int
        It has the tokens from `start` up to `length` of its context.
    parent : str or None
        The name of the file that has tokens before `start`; None where there are none.
    tokens : numpy.ndarray
        `(length - start,)` its own.
    nbytes : int
        Of the file.
    inode : int
        Of the file: another one may come to have its name.
    uses : int
        How often it was read.
    priority : float
        The one of the lowest goes first.
    """

    path: Path
    start: int
    length: int
    parent: str | None
    tokens: Tokens
    nbytes: int
    inode: int
    uses: int = 0
    priority: float = 0.0

    @classmethod
    def read(cls, path: Path) -> "ContextFile":
        """Read header and tokens of a file; raise `CacheFileError` if it is none of a context, or damaged."""
        file = TensorFile(path, {"format": [FORMAT], "layout": [LAYOUT]})
        with _in_errors(path):
            start, length = int(file.metadata["start"]), int(file.metadata["length"])
            parent = file.metadata["parent"] or None
            require(0 <= start < length, f"{path} says that it has tokens {start} to {length}")
            require((parent is None) == (start == 0), f"{path} begins at token {start} of {parent}")
            require(parent is None or NAME.fullmatch(parent) is not None, f"{path} goes on from {parent!r}")
            spec = file.specs["tokens"]
            require(spec.shape == (length - start,) and spec.dtype == torch.int64, f"{path}: its tokens are {spec}")
        with file:
            file.verify_one("tokens")
            tokens = file["tokens"].numpy().copy()
        state = path.stat()
        return cls(path, start, length, parent, tokens, state.st_size, state.st_ino)


def write_context(path: Path, tokens: Tokens, start: int, parent: str | None, cache: PiKVCache) -> None:
    """Write the tokens of a context from `start` on, all of which a cache holds; see :func:`write_tensors`.

    No more than a layer is decoded at a time.

    Raises
    ------
    OSError
        If it could not be written, or a symbolic link has its name.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    groups, unpaged = [Group.of({"tokens": torch.from_numpy(tokens[start:].copy())})], {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, PiKVLayer):
            groups.append(_group(index, layer, start))
        else:
            description, written = describe_layer(index, layer)
            unpaged[index] = description
            groups += written
    metadata = {
        "format": FORMAT,
        "layout": LAYOUT,
        "start": str(start),
        "length": str(len(tokens)),
        "parent": parent or "",
        "layers": str(len(cache.layers)),
        "unpaged": json.dumps(unpaged),
    }
    write_tensors(path, metadata, groups)


def _group(index: int, layer: PiKVLayer, start: int) -> Group:
    """Return the tokens of a layer from a column on, decoded when they are written."""
    empty = segment_of(layer, layer.seen)
    own = layer.seen - start
    specs = {f"{name}.{index}": _spec(getattr(empty, name), own) for name in _PARTS}
    return Group(specs, lambda: iter([segment_of(layer, start)]))


def _spec(empty: torch.Tensor, tokens: int) -> Spec:
    return Spec(empty.dtype, (tokens, *empty.shape[1:]))


def append_context(known: ContextFile, cache: PiKVCache, upto: int, device_of: DeviceOf) -> None:
    """Append to a cache what a file has behind its tokens, up to `upto` of them; of layers that are not paged, all.

    Raises
    ------
    CacheFileError
        If the file is damaged, or does not fit the model.
    OSError
        If it cannot be read.
    """
    have, path = cache.get_seq_length(), known.path
    with TensorFile(path, {"format": [FORMAT], "layout": [LAYOUT]}) as file, _in_errors(path):
        require(file.metadata["layers"] == str(len(cache.layers)), f"{path} is of {file.metadata['layers']} layers")
        unpaged = json.loads(file.metadata["unpaged"])
        paged = [index for index, layer in enumerate(cache.layers) if isinstance(layer, PiKVLayer)]
        require(set(unpaged) == {str(index) for index in range(len(cache.layers))} - set(map(str, paged)), f"{path}")
        own = known.length - known.start
        for index in paged:
            for name in _PARTS:
                shape, ndim = file.specs[f"{name}.{index}"].shape, 1 if name == "experts" else 3
                require(len(shape) == ndim and shape[0] == own, f"{path}: {name} of layer {index} are {shape}")
        file.verify()
        rows = slice(have - known.start, upto - known.start)
        for index in paged:
            keys, values, experts = (file[f"{name}.{index}"][rows] for name in _PARTS)
            device = device_of(index)
            # Not views of the file: it may go.
            moved = (each.to(device, copy=True) for each in (keys, values, experts))
            append_segment(cache.layers[index], Segment(*moved))
        if upto == known.length:
            for index, description in unpaged.items():
                loader = layer_loader(int(index), description, file, {})
                loader.check()
                loader.check_fits(cache.layers[int(index)])
                loader.restore(cache.layers[int(index)], device_of(int(index)))


@contextmanager
def _in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except CacheFileError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CacheFileError(f"{path} makes no sense or does not fit the model: {error!r}") from error


def tokens_before(files: dict[str, ContextFile], file: ContextFile) -> Tokens | None:
    """Return all tokens of the context of a file, None if one that it goes on from is gone."""
    parts, upto = [file.tokens], file.start
    for _ in files:
        if not upto:
            break
        before = files.get(file.parent or "")
        if before is None or before.length < upto:
            return None
        if before.start < upto:
            parts.append(before.tokens[: upto - before.start])
            upto = before.start
        file = before
    # Some that go on from one another in a circle never reach the beginning.
    return None if upto else np.concatenate(parts[::-1])
