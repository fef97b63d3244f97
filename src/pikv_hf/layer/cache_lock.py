"""The lock of a cache and its forks, which share pages: one thread at a time works on them, also across `os.fork()`."""

import os
import threading
import weakref
from contextlib import AbstractContextManager
from typing import Any, Protocol


class HasCacheLock(Protocol):
    """A cache, or what belongs to one."""

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The lock of the cache, its layers, and its forks."""


#: Every lock that exists, by its id.
_locks: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
#: Held by a thread that forks, and the locks that it has waited for.
_forking = threading.Lock()
_held: list[Any] = []


def new_cache_lock() -> AbstractContextManager[Any]:
    """Return a lock, of a cache say, which the thread that holds it may take again and `os.fork()` leaves usable.

    A thread that holds one takes no other cache's: two threads could wait for each other.
    """
    lock = threading.RLock()
    _locks[id(lock)] = lock
    return lock


def _before_fork() -> None:
    """Wait until no thread works on a cache: the child, in which only this thread goes on, gets them all complete."""
    _forking.acquire()
    # In one step: other threads go on to make caches.
    references = _locks.valuerefs()
    _held.extend(lock for reference in references if (lock := reference()) is not None)
    for lock in _held:
        lock.acquire()


def _after_fork() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
