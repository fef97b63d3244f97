"""Processes that share a cache: one collective per layer and step merges what each of them attends to."""

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .kernels import merge_pair

# What every process says of a call beside its result, in float32: layer, positions seen, rows, queries, whether it
# failed, and projections of its query.
_HEADER, _PROJECTIONS = 8, 3

# Queries of the same tokens differ between processes by rounding alone, those of others by their own size.
_SAME = 0.1


class ProcessError(RuntimeError):
    """Another process of the cache has died, raised or computes something else."""


class Exchange:
    """The processes of one cache.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup
        Used by caches alone, so that nothing else comes in between.
    timeout : float
        Seconds after which the group gives up, for messages.

    Attributes
    ----------
    rank, ranks : int
        Number of this process, and how many there are.
    collectives, bytes_sent : int
        Merges so far, and the bytes of this process's own results that each of the others received with them.
    seconds : float
        Time spent in them, waiting for others included; on CUDA only the time to launch them.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.collectives = self.bytes_sent = 0
        self.seconds = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Exchange":
        return self

    @contextmanager
    def joined(self, layer_idx: int, like: torch.Tensor, value_dim: int) -> Iterator[None]:
        """Let the others know if the block raises, instead of having them wait.

        Parameters
        ----------
        layer_idx : int
            The model layer.
        like : torch.Tensor
            `(B, Hq, Q, D)` queries, for the size of what they wait for.
        value_dim : int
            Dv.
        """
        try:
            yield
        except Exception as error:
            out = torch.zeros((*like.shape[:3], value_dim), dtype=torch.float32, device=like.device)
            header = self._header(layer_idx, 0, like)
            header[4] = 1.0
            try:
                self._gather(torch.cat([header, out.new_zeros(out[..., 0].numel()), out.flatten()]), layer_idx)
            except ProcessError as other:
                error.add_note(f"the other processes could not be told: {other}")
            raise

    def merge(
        self, layer_idx: int, seen: int, query: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge what the processes have attended to; the result is the same, bit by bit, in all of them.

        Parameters
        ----------
        layer_idx, seen : int
            The model layer and its positions so far.
        query : torch.Tensor
            `(B, Hq, Q, D)`.
        out, lse : torch.Tensor
            `(B, Hq, Q, Dv)` and `(B, Hq, Q)`, float32, over this process's own pages.

        Raises
        ------
        ProcessError
            If another process has died, raised, does not answer in time or attends with other queries.
        """
        header = self._header(layer_idx, seen, query)
        payload = torch.cat([header, lse.flatten(), out.flatten()])
        parts = self._gather(payload, layer_idx)
        self._check([part[:_HEADER] for part in parts], layer_idx)
        self.collectives += 1
        self.bytes_sent += payload.numel() * payload.element_size()
        result: tuple[torch.Tensor, torch.Tensor] | None = None
        for part in parts:
            one = part[_HEADER + lse.numel() :].view_as(out), part[_HEADER : _HEADER + lse.numel()].view_as(lse)
            result = one if result is None else merge_pair(*result, *one)
        assert result is not None
        return result

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, each of which has what the others lack."""
        if self.ranks == 1:
            return tensor
        result = self._movable(tensor.to(torch.int32 if tensor.dtype == torch.bool else torch.float32, copy=True))
        with self._explained("the sum of stored tokens"):
            dist.all_reduce(result, group=self.group)
        return result.to(tensor.device).to(tensor.dtype)

    def sum(self, number: int) -> int:
        """Return the sum of an integer over all processes."""
        result = self._movable(torch.tensor([number], dtype=torch.int64, device=self._device()))
        with self._explained("a sum of bytes"):
            dist.all_reduce(result, group=self.group)
        return int(result)

    def _device(self) -> torch.device:
        on_gpu = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _header(self, layer_idx: int, seen: int, query: torch.Tensor) -> torch.Tensor:
        batch, _, queries, _ = query.shape
        header = torch.tensor([layer_idx, seen, batch, queries], dtype=torch.float32, device=query.device)
        # Angles without a pattern: the same numbers in all processes, no state of a generator touched.
        angles = torch.arange(1, 1 + query.numel(), device=query.device, dtype=torch.float32)
        flat = query.detach().reshape(-1).float()
        scale = flat.norm().clamp_min(1e-20)
        projections = [(flat * torch.sin(angles * step)).sum() / scale for step in (1.7, 2.3, 0.9)]
        return torch.cat([header, header.new_zeros(1), torch.stack(projections)])

    def _gather(self, payload: torch.Tensor, layer_idx: int) -> list[torch.Tensor]:
        mine = self._movable(payload)
        parts = [torch.empty_like(mine) for _ in range(self.ranks)]
        started = time.perf_counter()
        with self._explained(f"layer {layer_idx}"):
            dist.all_gather(parts, mine, group=self.group)
        self.seconds += time.perf_counter() - started
        return [part.to(payload.device) for part in parts]

    def _movable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor where the group's backend can take it."""
        return tensor.cpu() if dist.get_backend(self.group) == "gloo" else tensor

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"rank {self.rank} of {self.ranks} got no answer from all others at {what}: one of them has died, "
                f"raised an error of its own, or took longer than {self.timeout:.0f} s ({_first_line(error)})"
            ) from error

    def _check(self, headers: list[torch.Tensor], layer_idx: int) -> None:
        """Raise if a process failed, or is not where this one is."""
        # One transfer for all of them.
        table = torch.stack(headers).tolist()
        mine = table[self.rank]
        for rank, other in enumerate(table):
            if other[4]:
                raise ProcessError(f"rank {self.rank}: rank {rank} failed at layer {layer_idx}; its own error says why")
            if other[:4] != mine[:4]:
                names = ("layer", "positions seen", "rows", "queries")
                differing = [
                    f"{name} {int(a)} here and {int(b)} there"
                    for name, a, b in zip(names, mine, other, strict=False)
                    if a != b
                ]
                raise ProcessError(f"ranks {self.rank} and {rank} do different things: {', '.join(differing)}")
            if any(abs(a - b) > _SAME for a, b in zip(mine[-_PROJECTIONS:], other[-_PROJECTIONS:], strict=True)):
                raise ProcessError(
                    f"ranks {self.rank} and {rank} attend with different queries at layer {layer_idx}, so they have "
                    "read or sampled different tokens; give all ranks the same inputs and the same seed"
                )


_groups: dict[tuple[int, float], Exchange] = {}


def join_processes(timeout: float) -> Exchange:
    """Return the exchange of all processes that `torchrun` or `accelerate launch` started.

    Every process must call it. The group is made once for each timeout and shared by all caches.

    Raises
    ------
    RuntimeError
        If this process was not started as one of several.
    """
    if not dist.is_available() or not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise RuntimeError(
                'process_group="world" needs several processes: start them with torchrun or accelerate launch'
            )
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())
    if not dist.is_initialized():
        raise RuntimeError('process_group="world" needs torch.distributed, which one process alone does not set up')
    key = id(dist.group.WORLD), timeout
    if key not in _groups:
        group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
        _groups[key] = Exchange(group, timeout)
    return _groups[key]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
