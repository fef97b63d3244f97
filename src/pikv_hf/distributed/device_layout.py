"""Where a cache keeps its shards: devices of this process, or one part in each of several processes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .process_exchange import Exchange, join_processes


@dataclasses.dataclass(frozen=True, slots=True)
class PartLocation:
    """Where one part of every layer keeps its pages.

    Attributes
    ----------
    number : int
        Of the part, from 0; part 0 reads the window.
    device : torch.device or None
        Where its pages are; None for where the layer's attention is.
    name : str
        For reports, as `"cuda:1"` or `"cpu:1"`; empty for the name of the device.
    """

    number: int
    device: torch.device | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class PartLayout:
    """The parts of a layer and how tokens are divided among them.

    Attributes
    ----------
    locations : tuple of PartLocation
        Those of this process.
    weights : tuple of float
        Of all parts, those of other processes too: in which proportion tokens outside of the window are divided.
    exchange : Exchange or None
        The processes, where there are several.
    """

    locations: tuple[PartLocation, ...] = (PartLocation(0),)
    weights: tuple[float, ...] = (1.0,)
    exchange: Exchange | None = None

    @property
    def parts(self) -> int:
        """How many parts there are, in all processes."""
        return len(self.weights)

    def fraction(self, number: int) -> float:
        """Return the fraction of the tokens outside of the window that a part is to have."""
        return self.weights[number] / sum(self.weights)


@dataclasses.dataclass(frozen=True, slots=True)
class Devices:
    """Devices of one process, and in which proportion tokens are divided among them.

    Attributes
    ----------
    names : tuple of str
        As given; logical devices of a CPU have a number each, `"cpu:0"`.
    weights : tuple of float
        Of the same length.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def around(self, home: torch.device) -> PartLayout:
        """Return the layout of a layer whose attention is on `home`: the window is there, with shards or without."""
        devices = [torch.device(name) for name in self.names]
        first = next((index for index, device in enumerate(devices) if _same(device, home)), None)
        order = [*([] if first is None else [first]), *(i for i in range(len(devices)) if i != first)]
        locations = [PartLocation(0, None, "" if first is None else self.names[first])]
        weights = [0.0 if first is None else self.weights[first]]
        for index in order if first is None else order[1:]:
            locations.append(PartLocation(len(locations), devices[index], self.names[index]))
            weights.append(self.weights[index])
        return PartLayout(tuple(locations), tuple(weights))


def find_spread(
    devices: str | Sequence[str | int | torch.device] | None,
    max_memory: Mapping[Any, Any] | None,
    process_group: str | None,
    timeout: float,
) -> Devices | PartLayout | None:
    """Return where a cache keeps its shards, from the arguments of :meth:`PiKVCache.for_model`.

    Returns
    -------
    Devices, PartLayout or None
        Devices of this process, one part in each of several processes, or everything where attention is.

    Raises
    ------
    ValueError
        For arguments that exclude each other, and as :func:`find_devices` and :func:`process_layout`.
    """
    if devices is not None and process_group is not None:
        raise ValueError(
            f"give either devices or process_group, got devices={devices!r} and process_group={process_group!r}: "
            "a process keeps its shards where its model is"
        )
    if process_group is not None and max_memory is not None:
        raise ValueError(
            f"max_memory={max_memory!r} divides shards among devices, but process_group={process_group!r} divides them "
            "evenly among processes"
        )
    if process_group is not None:
        return process_layout(process_group, timeout)
    if devices is not None:
        return find_devices(devices, max_memory)
    if max_memory is not None:
        raise ValueError(f'max_memory={max_memory!r} divides shards among devices; give devices="auto" or a list too')
    return None


def find_devices(devices: str | Sequence[str | int | torch.device], max_memory: Mapping[Any, Any] | None) -> Devices:
    """Return the devices for the pages of caches of a model that is loaded.

    Parameters
    ----------
    devices : str or sequence
        `"auto"` for all accelerators that `accelerate` sees (and the CPU where `max_memory` names it), or devices.
        `["cpu:0", "cpu:1"]` are parts of their own on one CPU.
    max_memory : mapping, optional
        As `accelerate` takes it: what each device may give, `{0: "10GiB", "cpu": "64GiB"}`. Shards are divided in these
        proportions, by default in those of the memory that is free now, once the model is loaded.

    Raises
    ------
    ValueError, TypeError
        For devices that there are not, or named twice, or without memory.
    """
    from accelerate.utils import get_max_memory

    if max_memory is not None and not isinstance(max_memory, Mapping):
        raise TypeError(f"max_memory must be a mapping from devices to bytes, got {max_memory!r}")
    if isinstance(devices, str):
        if devices != "auto":
            raise ValueError(f'devices must be "auto" or a list of devices, got {devices!r}')
        free = get_max_memory(None if max_memory is None else dict(max_memory))
        names = [_name(key) for key in free if _name(key) != "disk"]
        accelerators = [name for name in names if name != "cpu"]
        wanted = [name for name in names if max_memory is not None and name in map(_name, max_memory)] or accelerators
        names = wanted or ["cpu"]
    elif isinstance(devices, Sequence):
        names = [_name(device) for device in devices]
    else:
        raise TypeError(f'devices must be "auto" or a list of devices, got {devices!r}')
    if not names:
        raise ValueError("devices must name at least one device, got an empty list")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        hint = '; parts on one CPU are "cpu:0", "cpu:1"' if twice == "cpu" else ""
        raise ValueError(f"device {twice!r} is named {names.count(twice)} times{hint}")
    for name in names:
        _check_exists(name)
    return Devices(tuple(names), _weights(names, max_memory))


def _weights(names: list[str], max_memory: Mapping[Any, Any] | None) -> tuple[float, ...]:
    from accelerate.utils import get_max_memory

    if max_memory is not None:
        given = {_name(key): _bytes(key, value) for key, value in max_memory.items()}
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"max_memory says nothing of {missing[0]!r}, only of {', '.join(given)}")
        weights = tuple(given[name] for name in names)
    elif all(torch.device(name).type == "cpu" for name in names):
        weights = (1.0,) * len(names)
    else:
        free = {_name(key): float(value) for key, value in get_max_memory().items()}
        # Logical devices of the CPU divide its memory.
        cpus = sum(torch.device(name).type == "cpu" for name in names)
        weights = tuple(free["cpu"] / cpus if torch.device(name).type == "cpu" else free[name] for name in names)
    if min(weights) < 0 or not sum(weights):
        raise ValueError(f"devices {', '.join(names)} have no memory to give: {weights}")
    return weights


def _bytes(key: Any, value: Any) -> float:
    from accelerate.utils import convert_file_size_to_int

    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f'max_memory must be bytes or a text like "10GiB", got {value!r} for {key!r}')
    try:
        return float(convert_file_size_to_int(value))
    except ValueError:
        raise ValueError(f'max_memory must be bytes or a text like "10GiB", got {value!r} for {key!r}') from None


def _name(device: Any) -> str:
    if isinstance(device, int) and not isinstance(device, bool):
        return f"{_accelerator()}:{device}"
    if not isinstance(device, str | torch.device):
        raise TypeError(f"a device must be a name, a number or a torch.device, got {device!r}")
    if str(device) == "disk":
        return "disk"
    try:
        known = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device that torch knows: {str(error).splitlines()[0]}") from None
    return str(known) if known.index is not None or known.type == "cpu" else f"{known.type}:0"


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cuda" if found is None else found.type


def _check_exists(name: str) -> None:
    if name == "disk":
        raise ValueError("attention cannot compute on the device 'disk'; tiers={\"disk\": None} keeps pages there")
    device = torch.device(name)
    if device.type == "cpu":
        return
    there = (
        torch.accelerator.device_count() if torch.accelerator.is_available() and device.type == _accelerator() else 0
    )
    if (device.index or 0) >= there:
        raise ValueError(f"device {name!r} is not there: {there} devices of type {device.type!r}")


def _same(device: torch.device, other: torch.device) -> bool:
    if device.type != other.type:
        return False
    return device.type == "cpu" or (device.index or 0) == (other.index or 0)


def process_layout(process_group: str, timeout: float) -> PartLayout:
    """Return the layout of a cache whose parts are processes; all of them must call this.

    Raises
    ------
    ValueError
        For anything but `"world"`, or a timeout that is no positive number of seconds.
    RuntimeError
        If this process is not one of several.
    """
    if process_group != "world":
        raise ValueError(f'process_group must be "world", got {process_group!r}')
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    exchange = join_processes(float(timeout))
    return PartLayout((PartLocation(exchange.rank),), (1.0,) * exchange.ranks, exchange)


def attention_device(module: nn.Module | None, model: Any) -> torch.device:
    """Return where a layer's attention computes, also where accelerate brings its weights only for that."""
    for parameter in () if module is None else module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    for part in () if module is None else module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in (hook, *getattr(hook, "hooks", ())):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device(model.device)
