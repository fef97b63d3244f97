"""Telling a process from those that it was forked from: threads stay behind in a fork, and open files are shared."""

import os

_generation = 0


def process_generation() -> int:
    """Return how often this process, and those before it, were forked from one another.

    What was made in another generation than now was made by a process that may still be using it. Unlike `os.getpid`,
    which containers and long uptimes give to several processes, it is never the same in a process and its ancestors.
    """
    return _generation


def _after_fork() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
