"""Generation that forks its process on the way: every process goes on, and tells its tokens to the first one."""

import json
import os
import select
import signal
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

#: A process that takes longer hangs.
SECONDS = 40


class Fork(LogitsProcessor):
    """Forks the process at some steps of a running `generate`, in every process that gets there.

    Attributes
    ----------
    children : list of int
        Processes that this one has forked.
    is_child : bool
        Whether this process was forked from the one that began.
    """

    def __init__(self, steps: Collection[int], before: Callable[[], None] = lambda: None) -> None:
        self.steps, self.before = steps, before
        self.at, self.children, self.is_child = 0, [], False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.at in self.steps:
            self.before()
            if child := os.fork():
                self.children.append(child)
            else:
                self.children, self.is_child = [], True
                # Whatever holds it up, it does not stay.
                signal.alarm(SECONDS)
        self.at += 1
        return scores


def tokens_of_all(fork: Fork, generate: Callable[..., torch.Tensor]) -> list[Any]:
    """Generate with forks; return what each process of the tree got, tokens or an error, in any order.

    Raises
    ------
    TimeoutError
        If one of them has not told in time.
    """
    reads, writes = os.pipe()
    try:
        said: Any = generate(logits_processor=LogitsProcessorList([fork])).tolist()
    except BaseException as error:
        said = repr(error)
    os.write(writes, json.dumps(said).encode() + b"\n")
    if fork.is_child:
        # Not out of the test that it is in, and without waiting for what it forked itself.
        os._exit(0)
    os.close(writes)
    try:
        return [json.loads(line) for line in _read_all(reads).splitlines()]
    finally:
        os.close(reads)
        for child in fork.children:
            os.waitpid(child, 0)


def _read_all(descriptor: int) -> bytes:
    """Read until every process has closed the other end, by ending at the latest."""
    data, end = b"", time.monotonic() + SECONDS
    while True:
        if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
            lines = data.count(b"\n")
            raise TimeoutError(f"a forked process hangs: {lines} have told within {SECONDS} s")
        if not (some := os.read(descriptor, 1 << 16)):
            return data
        data += some
