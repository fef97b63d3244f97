"""Processes that share a cache: one collective per layer and step merges what each of them attends to."""

import datetime
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist

from ..kernels import merge_pair
from .lockstep import AGREEMENT, FAILS, HEADER, INTENT, agreement_of, difference, header_of

# Errors of a call that was not right to begin with: it is not right in the other processes either.
_EVERYWHERE = (ValueError, TypeError, IndexError)


_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


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
    serial : int
        Which of the groups that these processes have made, for what they leave to each other.

    Attributes
    ----------
    rank, ranks : int
        Number of this process, and how many there are.
    left_because : str
        Why this process has left the others; empty while it has not.
    collectives, bytes_sent : int
        Merges so far, and the bytes that each of the others received of this process: results, and what precedes them.
    seconds : float
        Time spent in them, waiting for others included; on CUDA only the time to launch them.
    """

    def __init__(self, group: Any, timeout: float, serial: int = 0) -> None:
        self.group, self.timeout, self.serial = group, timeout, serial
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.left_because = ""
        self.collectives = self.bytes_sent = 0
        self.seconds = 0.0
        # Of each message, in float32 numbers.
        self._size = AGREEMENT
        # What the processes said with the last merge, until it is looked at: on a GPU that would wait for it.
        self._headers: tuple[torch.Tensor, int, torch.dtype] | None = None
        self._defers = dist.get_backend(group) == "nccl"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Exchange":
        return self

    # Errors

    @contextmanager
    def joined(self, layer_idx: int, query: torch.Tensor) -> Iterator[None]:
        """Let the others know if the block, in which this process attends, raises: they wait for its result.

        Parameters
        ----------
        layer_idx : int
            The model layer.
        query : torch.Tensor
            `(B, Hq, Q, D)`.
        """
        try:
            yield
        except Exception as error:
            payload = torch.zeros(HEADER, device=query.device)
            payload[0], payload[INTENT] = layer_idx, FAILS
            try:
                # Before the others know that there is something to read.
                _write(self._key(f"failed/{self.rank}"), _summary(error))
                self._gather(payload, f"layer {layer_idx}")
            except ProcessError as other:
                error.add_note(f"the other processes could not be told: {other}")
            raise

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Leave the others if the block raises, so that they do not wait for this process until the timeout.

        Errors that all processes make alike, as with tensors that do not fit, leave nobody.
        """
        try:
            yield
        except ProcessError:
            raise
        except Exception as error:
            if not isinstance(error, _EVERYWHERE):
                _write(self._key(f"left/{self.rank}"), _summary(error))
                self._leave(f"rank {self.rank} raised {_summary(error)}")
            raise

    def _leave(self, reason: str) -> None:
        """Close the connections: whoever waits for this process ends now."""
        if self.left_because:
            return
        self.left_because, group, self.group = reason, self.group, None
        _write(self._key("anyone-left"), "1")
        if dist.is_initialized() and dist.get_backend(group) == "gloo":
            # Others wait for what they have begun: NCCL's watchdog ends them after the timeout.
            dist.destroy_process_group(group)

    def anyone_left(self) -> bool:
        """Whether a process has left, this one or another."""
        return bool(self.left_because) or bool(_read(self._key("anyone-left")))

    def _reasons(self) -> str:
        """Return what other processes have left word of."""
        found = [(rank, _read(self._key(f"left/{rank}"))) for rank in range(self.ranks) if rank != self.rank]
        return "; ".join(f"rank {rank} raised {reason}" for rank, reason in found if reason)

    def _key(self, name: str) -> str:
        return f"pikv_hf/{self.timeout:g}/{self.serial}/{name}"

    # Collectives

    def agree(
        self,
        layer_idx: int,
        seen: int,
        query: torch.Tensor,
        value_dim: int,
        prompt: torch.Tensor | None,
        leads: bool = True,
    ) -> None:
        """See to it that all processes are about to merge results of one size, after the same prompt.

        To be called before each merge; sends something only where the size changes or a prompt was read. A message of
        another size than expected would end a process without an exception, so all have the size that was agreed on
        last, this one too.

        Parameters
        ----------
        layer_idx, seen : int
            The model layer and its positions so far.
        query : torch.Tensor
            `(B, Hq, Q, D)`.
        value_dim : int
            Dv.
        prompt : torch.Tensor, optional
            `(4,)` float32 :func:`~pikv_hf.distributed.lockstep.prompt_mark` of a prompt's keys that were not agreed on
            yet.
        leads : bool
            As for :meth:`merge`.

        Raises
        ------
        ProcessError
            As :meth:`merge`.
        """
        size = max(AGREEMENT, HEADER + query[..., 0].numel() * (1 + value_dim))
        if size != self._size or prompt is not None:
            self._look()
            said = agreement_of(layer_idx, seen, query, value_dim, prompt, leads)
            self._note(self._gather(said, f"layer {layer_idx}"), layer_idx, query.dtype)
            self._look()
            self._size = size

    def merge(
        self,
        layer_idx: int,
        seen: int,
        query: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        leads: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge what the processes have attended to; the result is the same, bit by bit, in all of them.

        On a GPU what other processes say beside it is looked at before the next merge.

        Parameters
        ----------
        layer_idx, seen : int
            The model layer and its positions so far.
        query : torch.Tensor
            `(B, Hq, Q, D)`.
        out, lse : torch.Tensor
            `(B, Hq, Q, Dv)` and `(B, Hq, Q)`, float32, over this process's own pages.
        leads : bool
            Whether this is the first of the layers, where queries depend on little but their tokens: they are compared
            there, so that a single other token among many is noticed.

        Raises
        ------
        ProcessError
            If another process has died, raised, does not answer in time or attends with other queries.
        """
        self._look()
        payload = torch.cat([header_of(layer_idx, seen, query, leads), lse.flatten(), out.flatten()])
        messages = self._gather(payload, f"layer {layer_idx}")
        self._note(messages, layer_idx, query.dtype)
        if not self._defers:
            self._look()
        self.collectives += 1
        result: tuple[torch.Tensor, torch.Tensor] | None = None
        for message in messages:
            _, its_lse, its_out, _ = message.split([HEADER, lse.numel(), out.numel(), self._size - payload.numel()])
            one = its_out.view_as(out), its_lse.view_as(lse)
            result = one if result is None else merge_pair(*result, *one)
        assert result is not None
        return result

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes, each of which has what the others lack."""
        if self.ranks == 1 or not tensor.numel():
            return tensor
        wide = torch.promote_types(tensor.dtype, torch.float32 if tensor.is_floating_point() else torch.int32)
        return self._sum(tensor.to(wide, copy=True), "the sum of stored tokens").to(tensor.dtype)

    def sum(self, number: int) -> int:
        """Return the sum of an integer over all processes."""
        return int(self._sum(torch.tensor([number], device=self._device()), "a sum of bytes"))

    def _sum(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        with self._explained(what):
            result = self._movable(tensor)
            dist.all_reduce(result, group=self.group)
        return result.to(tensor.device)

    def _device(self) -> torch.device:
        on_gpu = not self.left_because and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def _gather(self, payload: torch.Tensor, where: str) -> list[torch.Tensor]:
        started = time.perf_counter()
        payload = torch.nn.functional.pad(payload, (0, self._size - payload.numel()))
        with self._explained(where):
            mine = self._movable(payload)
            messages = [torch.empty_like(mine) for _ in range(self.ranks)]
            dist.all_gather(messages, mine, group=self.group)
        self.seconds += time.perf_counter() - started
        self.bytes_sent += payload.numel() * payload.element_size()
        return [message.to(payload.device) for message in messages]

    def _movable(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor where the group's backend can take it."""
        return tensor.cpu() if dist.get_backend(self.group) == "gloo" else tensor

    @contextmanager
    def _explained(self, where: str) -> Iterator[None]:
        me = f"rank {self.rank} of {self.ranks}"
        if self.left_because:
            raise ProcessError(f"{me} is alone since {self.left_because}; make a new cache in all processes")
        try:
            yield
        except RuntimeError as error:
            cause = self._reasons() or (
                "one of them has died, raised an error of its own, stopped calling, is given other inputs, or took "
                f"longer than {self.timeout:g} s"
            )
            self._leave(f"it got no answer at {where}: {cause}")
            raise ProcessError(f"{me} got no answer from all others at {where}: {cause} ({_summary(error)})") from error

    def _note(self, messages: list[torch.Tensor], layer_idx: int, dtype: torch.dtype) -> None:
        # One transfer for all of them.
        self._headers = torch.stack([message[:AGREEMENT] for message in messages]), layer_idx, dtype

    def _look(self) -> None:
        """Raise if a process has failed, or was not where this one is."""
        if self._headers is None:
            return
        (said, layer_idx, dtype), self._headers = self._headers, None
        table = said.tolist()
        mine = table[self.rank]
        for rank, other in enumerate(table):
            if other[INTENT] == FAILS:
                reason = _read(self._key(f"failed/{rank}")) or "its own error says why"
                raise ProcessError(f"rank {self.rank}: rank {rank} failed at layer {layer_idx}: {reason}")
            if wrong := difference(mine, other, dtype):
                raise ProcessError(f"ranks {self.rank} and {rank}, at layer {layer_idx}, {wrong}")


class _InGroup(Protocol):
    """What several processes may keep together: a layer of a cache."""

    @property
    def exchange(self) -> Exchange | None:
        """The processes, None if it is this one alone."""


_Member = TypeVar("_Member", bound=_InGroup)


def leave_group_on_error(
    method: Callable[Concatenate[_Member, _Given], _Result],
) -> Callable[Concatenate[_Member, _Given], _Result]:
    """Have a layer's method leave the other processes if it raises; see :meth:`Exchange.leaving`."""

    @functools.wraps(method)
    def guarded(member: _Member, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if (exchange := member.exchange) is None:
            return method(member, *args, **kwargs)
        with exchange.leaving():
            return method(member, *args, **kwargs)

    return guarded


_groups: dict[float, tuple[Any, Exchange]] = {}


def join_processes(timeout: float) -> Exchange:
    """Return the exchange of all processes that `torchrun` or `accelerate launch` started.

    Every process must call it. The group is made once for each timeout and shared by all caches, until a process leaves
    it.

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
    world, known = _groups.get(timeout, (None, None))
    if known is None or world is not dist.group.WORLD or known.anyone_left():
        serial = 0 if known is None else known.serial + 1
        group = dist.new_group(timeout=datetime.timedelta(seconds=timeout))
        known = Exchange(group, timeout, serial)
        _groups[timeout] = dist.group.WORLD, known
    return known


# Processes leave each other word in the store by which they found each other. Where it is gone, nothing is said.


def _write(key: str, value: str) -> None:
    with suppress(Exception):
        dist.distributed_c10d._get_default_store().set(key, value)


def _read(key: str) -> str:
    with suppress(Exception):
        store = dist.distributed_c10d._get_default_store()
        return str(store.get(key).decode()) if store.check([key]) else ""
    return ""


def _summary(error: BaseException) -> str:
    """Return an error's class and first line, in short."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
