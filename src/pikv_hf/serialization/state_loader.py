"""Loading a layer of transformers' own that has states, or holds nothing: checked against the file, then filled."""

from typing import Any

import torch

from ..layer.own_layer import is_state_layer
from .format import STATE_LAYER, layer_prefix, read_keys
from .tensor_file import Section, Spec, TensorFile, require

_CONV, _RECURRENT = "conv_states", "recurrent_states"


class StateLayerLoader:
    """Loads a layer with convolution or recurrent states, or with nothing in it.

    Parameters
    ----------
    index : int
        The model layer.
    description : dict
        What :func:`~pikv_hf.serialization.layer_writer.describe_layer` made.
    file : TensorFile
        Its tensors.
    """

    def __init__(self, index: int, description: dict[str, Any], file: TensorFile) -> None:
        layer = read_keys(STATE_LAYER, description, "it")
        self.name, self.seen, self.tensors = layer["class"], layer["seen"], layer["tensors"]
        self.kernels, self.previous = layer["conv_kernel_sizes"], layer["has_previous_state"]
        self._section = Section(file, layer_prefix(index))

    def specs(self) -> dict[str, Spec]:
        """Return the tensors that the file must have for the layer."""
        return {self._section.name(name): self._section.spec(name) for name in self.tensors}

    def check(self) -> None:
        """Raise unless the tensors fit one another and what is said of them."""
        count = len(self.previous)
        known = {"keys", "values", *(f"{kind}.{number}" for kind in (_CONV, _RECURRENT) for number in range(count))}
        require(set(self.tensors) <= known, f"it has {self.tensors}, with {count} states of each kind")
        require(("keys" in self.tensors) == ("values" in self.tensors), f"it has {self.tensors}")
        require(len(self.kernels) == count, f"{len(self.kernels)} kernels for {count} convolutions")
        shapes = {name: self._section.spec(name).shape for name in self.tensors}
        require(all(len(shape) > 1 for shape in shapes.values()), f"tensors have the shapes {shapes}")
        require(len({shape[0] for shape in shapes.values()}) <= 1, f"tensors of {shapes} are of different batches")
        for number, kernel in enumerate(self.kernels):
            shape = shapes.get(f"{_CONV}.{number}")
            require((shape is None) == (kernel is None), f"kernel {kernel}, convolution state of shape {shape}")

    def check_fits(self, layer: Any) -> None:
        """Raise unless the model's layer is of this class, with as many states."""
        here, there = type(layer).__name__, self.name
        require(here == there, f"it was saved as a {there}, and is a {here} here")
        count = layer.number_of_states if is_state_layer(layer) else 0
        require(count == len(self.previous), f"it was saved with {len(self.previous)} states, and has {count} here")

    def restore(self, layer: Any, device: torch.device) -> None:
        """Fill an empty layer, whose states are on `device`."""
        for name in self.tensors:
            kind, _, number = name.partition(".")
            # A copy, since what the file has is mapped into memory.
            state = self._section[name].to(device, copy=True)
            if not number:
                setattr(layer, kind, state)
                layer.is_initialized = True
                continue
            getattr(layer, kind)[int(number)] = state
            getattr(layer, f"is_{kind}_initialized")[int(number)] = True
            if kind == _CONV and layer.device is None:
                layer.dtype, layer.device = state.dtype, state.device
        for number, (kernel, previous) in enumerate(zip(self.kernels, self.previous, strict=True)):
            layer.conv_kernel_size[number], layer.has_previous_state[number] = kernel, previous
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = self.seen
