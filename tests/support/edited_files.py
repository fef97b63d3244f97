"""Saved caches written anew with something changed, with checksums that fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pikv_hf.serialization.format import FORMAT
from pikv_hf.serialization.tensor_file import TensorFile
from pikv_hf.serialization.tensor_writer import Group, write_tensors


def rewritten(
    saved: Path,
    path: Path,
    change: Callable[[list[Any], dict[str, torch.Tensor]], None],
    more: dict[str, str] | None = None,
) -> Path:
    """Write a file with right checksums of changed descriptions of layers and tensors, and other metadata."""
    with TensorFile(saved, {"format": [FORMAT]}) as file:
        tensors = {name: file[name].clone() for name in file.specs}
        metadata = {k: v for k, v in file.metadata.items() if k not in ("checksums", "header_checksum")}
    layers = json.loads(metadata["layers"])
    change(layers, tensors)
    groups = [Group.of({name: tensor}) for name, tensor in tensors.items()]
    write_tensors(path, {**metadata, "layers": json.dumps(layers), **(more or {})}, groups)
    return path


def set_tensor(name: str, place: Any, value: int) -> Callable[[list[Any], dict[str, torch.Tensor]], None]:
    def change(layers: list[Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][place] = value

    return change
