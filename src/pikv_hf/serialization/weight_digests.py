"""Digests of a sample of a model's weights, which differ where the model has been trained or its weights replaced."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import xxhash
from torch import nn

#: Numbers of each parameter that go into a digest, evenly spread over it.
SAMPLES = 64

#: The group that a tensor belongs to, its name, and the tensor; None where its numbers are not to be had.
Weight = tuple[str, str, torch.Tensor | None]


def digests_of(weights: Iterable[Weight]) -> dict[str, str | None]:
    """Return the digest of each group of weights, None where the numbers of one of them are not to be had."""
    weights = list(weights)
    samples = _on_host([None if tensor is None else sample_of(tensor, SAMPLES) for _, _, tensor in weights])
    digests = {group: xxhash.xxh3_64() for group, _, _ in weights}
    unknown = set()
    for (group, name, tensor), sample in zip(weights, samples, strict=True):
        if tensor is None or sample is None:
            unknown.add(group)
            continue
        digests[group].update(f"{name} {tuple(tensor.shape)}".encode())
        digests[group].update(sample.data)
    return {group: None if group in unknown else digest.hexdigest() for group, digest in digests.items()}


def stored_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield the parameters of one module and the buffers that are saved with them; None where they are not to be had.

    Not to be had are those that accelerate has moved to disk without a map, and those of a class of their own.
    """
    buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
    for name, tensor in {**module._parameters, **buffers}.items():
        if tensor is not None:
            plain = tensor.data if tensor.device.type != "meta" else _offloaded(module, name)
            yield name, plain if type(plain) is torch.Tensor else None


def _offloaded(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter that accelerate keeps elsewhere until the module runs."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            return weights[name]
    return None


def sample_of(tensor: torch.Tensor, most: int) -> torch.Tensor:
    """Return at most so many numbers of a tensor, evenly spread, on its device."""
    indices = _spread_indices(tensor.numel(), most, tensor.device)
    return tensor.view(-1)[indices] if tensor.is_contiguous() else tensor[torch.unravel_index(indices, tensor.shape)]


@functools.lru_cache(maxsize=64)
def _spread_indices(total: int, most: int, device: torch.device) -> torch.Tensor:
    """Return at most so many of the numbers 0..total-1, evenly spread."""
    some = min(most, total)
    return torch.arange(some, device=device) * total // max(1, some)


def _on_host(samples: list[torch.Tensor | None]) -> list[np.ndarray | None]:
    """Return samples in float32 on the host, with one transfer for each device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample is not None:
            alike[sample.device, sample.dtype].append(index)
    fetched: list[np.ndarray | None] = [None] * len(samples)
    for indices in alike.values():
        parts = [part for index in indices if (part := samples[index]) is not None]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        together = torch.cat(parts).float().cpu().numpy()
        for index, numbers in zip(indices, np.split(together, ends), strict=True):
            fetched[index] = numbers
    return fetched
