"""The contexts that a folder has: found by their tokens, written whole or not at all, and kept within a limit.

There is no index to fall behind the files: each says of itself what it is, with checksums, and appears under its name
when all of it is on disk. What processes do to the folder they do under a lock, and each looks again when it changes.
"""

import fcntl
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..cache import PiKVCache
from ..serialization.tensor_file import CacheFileError
from .context_entry import is_croppable
from .context_file import NAME, ContextFile, DeviceOf, append_context, name_of, tokens_before, write_context
from .eviction_value import gdsf
from .radix_tree import Node, RadixTree, Tokens

_LOCK = ".lock"
# What a writer that was killed may leave where the file system knows no files without names.
_TEMPORARY = ".pikv-*.tmp"


class ContextFolder:
    """The files of one model, one set of options and one salt.

    Parameters
    ----------
    path : Path
        Made if it is not there, for its owner alone.
    limit : int or None
        The most bytes of all files, which holds after every call that writes.

    Attributes
    ----------
    errors : int
        How often something could not be read or written; the first time a warning says so.
    """

    def __init__(self, path: Path, limit: int | None) -> None:
        self.path, self.limit, self.errors = path, limit, 0
        self._files: dict[str, ContextFile] = {}
        self._tree: RadixTree[ContextFile] = RadixTree()
        self._seen: int | None = None
        self._age = 0.0
        self._lock, self._writing = threading.RLock(), set[str]()
        try:
            for made in (path.parent, path):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._folder_lock(fcntl.LOCK_EX):
                for left in path.glob(_TEMPORARY):
                    left.unlink(missing_ok=True)
        except OSError as error:
            self._failed(error, "cannot be written to")

    # What there is

    def refresh(self, always: bool = False) -> None:
        """Take note of files that have come, changed or gone, whoever did it; damaged ones go with a warning.

        A change within a tick of the clock after the last look is seen with the next one, or if it is `always` looked.
        """
        try:
            changed = os.stat(self.path).st_mtime_ns
            if changed == self._seen and not always:
                return
            found = {each.name: each.inode() for each in os.scandir(self.path) if each.is_file(follow_symlinks=False)}
        except OSError as error:
            self._failed(error, "cannot be read")
            return
        self._seen = changed
        for name in [name for name, file in self._files.items() if found.get(name) != file.inode]:
            self._forget(name)
        new: dict[str, ContextFile] = {}
        for name in found.keys() - self._files.keys():
            if NAME.fullmatch(name):
                try:
                    new[name] = ContextFile.read(self.path / name)
                except FileNotFoundError:
                    continue
                except (CacheFileError, KeyError, TypeError, ValueError) as error:
                    self._sweep(self.path / name, error)
                except OSError as error:
                    # It may be read another time.
                    self._failed(error, "has a file that cannot be read")
        self._admit(new)

    def _admit(self, new: dict[str, ContextFile]) -> None:
        files = self._files | new
        for name, file in new.items():
            tokens = tokens_before(files, file)
            if tokens is None:
                self._sweep(file.path, f"it goes on from {file.parent}, which is gone")
            elif name_of(tokens) != name:
                self._sweep(file.path, "its tokens are not those that it is named after")
            else:
                self._add(tokens, file)

    def _add(self, tokens: Tokens, file: ContextFile) -> None:
        self._files[file.path.name] = file
        self._tree.insert(tokens).value = file
        file.priority = self._priority(file)

    def _forget(self, name: str) -> set[str]:
        """Forget a file and those that go on from it, which are of no use without; return their names."""
        gone = {name}
        while more := {name for name, file in self._files.items() if file.parent in gone} - gone:
            gone |= more
        files = [self._files.pop(each) for each in gone & self._files.keys()]
        for node in [node for node in self._tree.nodes() if node.value in files]:
            self._tree.remove(node)
        return gone

    def _remove(self, name: str) -> None:
        for each in self._forget(name):
            (self.path / each).unlink(missing_ok=True)

    def _sweep(self, path: Path, why: object) -> None:
        """Remove a file of ours that is of no use, and say so."""
        warnings.warn(f"a stored context is skipped and removed: {path}: {why}", stacklevel=2)
        try:
            self._remove(path.name)
        except OSError as error:
            self._failed(error, "cannot be written to")

    def size(self) -> tuple[int, int]:
        """Return how many files there are, and their bytes."""
        with self._lock:
            self.refresh()
            return len(self._files), self._nbytes()

    def _nbytes(self) -> int:
        return sum(file.nbytes for file in self._files.values())

    # Reading

    def find(self, tokens: Tokens) -> int:
        """Return how many of the first tokens some file knows."""
        with self._lock:
            self.refresh()
            return self._tree.find(tokens)[1]

    def extend(self, cache: PiKVCache, tokens: Tokens, upto: int, device_of: DeviceOf) -> None:
        """Append to a cache, which holds the first tokens, those up to `upto`, or up to a damaged file.

        Raises
        ------
        CacheFileError, OSError
            If a file is damaged or gone; it is removed, and the cache may have got a part of the tokens.
        """
        with self._lock:
            chain = self._chain(tokens[:upto], cache.get_seq_length())
        for file, end in reversed(chain):
            try:
                append_context(file, cache, end, device_of)
            except OSError:
                with self._lock:
                    self.errors += 1
                    self._forget(file.path.name)
                raise
            except (CacheFileError, ValueError) as error:
                with self._lock:
                    self._sweep(file.path, error)
                raise CacheFileError(str(error)) from error
            with self._lock:
                file.uses += 1
                file.priority = self._priority(file)

    def _chain(self, tokens: Tokens, have: int) -> list[tuple[ContextFile, int]]:
        """Return the files with tokens behind the first `have`, the last first, and up to where each is read."""
        node, at = self._tree.find(tokens)
        if at < len(tokens):
            raise CacheFileError(f"of {len(tokens)} tokens {self.path} has {at} now")
        holder: ContextFile = next(each.value for each in node.below() if each.value is not None)
        chain = []
        while at > have:
            if holder.start < at:
                chain.append((holder, at))
                at = holder.start
            if at:
                holder = self._files[holder.parent or ""]
        return chain

    def whole(self, tokens: Tokens) -> int:
        """Return the length of the longest file whose whole context these tokens begin with."""
        with self._lock:
            self.refresh()
            return self._whole_length(*self._tree.find(tokens))

    def _whole_length(self, node: Node[ContextFile], known: int) -> int:
        return max((each.length for each in node.path() if each.value is not None and each.length <= known), default=0)

    # Writing

    def write(self, tokens: Tokens, cache: PiKVCache) -> None:
        """Write what a cache holds of a context and no file does; what cannot be written is said once."""
        path = self.path / name_of(tokens)
        try:
            # Others go on, and write; nobody removes what this one goes on from, or takes it for left over.
            with self._folder_lock(fcntl.LOCK_SH):
                with self._lock:
                    self.refresh(always=True)
                    found = None if path.name in self._writing else self._missing(tokens, cache)
                    if found is None:
                        return
                    self._writing.add(path.name)
                try:
                    write_context(path, tokens, *found, cache)
                finally:
                    self._writing.discard(path.name)
            with self._folder_lock(fcntl.LOCK_EX), self._lock:
                self.refresh(always=True)
                self._keep_limit()
        except OSError as error:
            self._failed(error, "cannot be written to")

    def _missing(self, tokens: Tokens, cache: PiKVCache) -> tuple[int, str | None] | None:
        """Return from which token on files lack a context, and the file that has those before; None if they lack none.

        What cannot be cropped goes on from a whole context, and is one only where it ends.
        """
        node, known = self._tree.find(tokens)
        if is_croppable(cache):
            holders = (each.value for each in node.below() if known and each.value is not None)
        else:
            known = self._whole_length(node, known)
            holders = (each.value for each in node.path() if each.value is not None and each.length == known)
        holder = next(holders, None)
        if known == len(tokens):
            return None
        return (0, None) if holder is None else (known, holder.path.name)

    def _keep_limit(self) -> None:
        while self.limit is not None and self._nbytes() > self.limit:
            needed = {file.parent for file in self._files.values()}
            last = min((file for name, file in self._files.items() if name not in needed), key=_priority_of)
            self._age = last.priority
            self._remove(last.path.name)

    def prune(self) -> None:
        """Remove what is damaged, and what exceeds the limit."""
        try:
            with self._folder_lock(fcntl.LOCK_EX), self._lock:
                self.refresh(always=True)
                self._keep_limit()
        except OSError as error:
            self._failed(error, "cannot be written to")

    def forget(self, tokens: Tokens) -> None:
        """Remove all contexts that begin with these tokens, and those that go on from a part of one of them."""
        try:
            with self._folder_lock(fcntl.LOCK_EX), self._lock:
                self.refresh(always=True)
                node, known = self._tree.find(tokens)
                below = [each.value for each in node.below() if each.value is not None] if known == len(tokens) else []
                for file in below:
                    self._remove(file.path.name)
        except OSError as error:
            self._failed(error, "cannot be written to")

    def _priority(self, file: ContextFile) -> float:
        return gdsf(self._age, file.uses, file.length - file.start, file.nbytes)

    @contextmanager
    def _folder_lock(self, kind: int) -> Iterator[None]:
        """Keep other processes, and threads, from changing what files there are, or all but writers of new ones.

        It is taken before the lock of the threads, never within it.
        """
        with open(self.path / _LOCK, "ab") as lock:
            fcntl.flock(lock, kind)
            yield

    def _failed(self, error: OSError, what: str) -> None:
        self.errors += 1
        if self.errors == 1:
            warnings.warn(f"the folder of contexts {self.path} {what}: {error}; going on without", stacklevel=3)


def _priority_of(file: ContextFile) -> float:
    return file.priority
