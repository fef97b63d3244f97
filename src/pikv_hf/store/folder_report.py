"""What a folder of contexts has, without a model: listed, verified and pruned."""

import dataclasses
from pathlib import Path

from ..serialization.tensor_file import CacheFileError, TensorFile
from .context_file import FORMAT, LAYOUT, NAME, ContextFile, tokens_before
from .context_folder import ContextFolder


@dataclasses.dataclass(frozen=True, slots=True)
class StoredContext:
    """A file of a folder of contexts.

    Attributes
    ----------
    folder, name : str
        Those of one model, its options and a salt share a folder.
    tokens : int
        Of its context, those of the files before it included; 0 where these are not known.
    own : int
        Of them in this file.
    nbytes : int
        Of the file.
    written : float
        When, in seconds since 1970.
    wrong : str or None
        Why it is of no use.
    """

    folder: str
    name: str
    tokens: int
    own: int
    nbytes: int
    written: float
    wrong: str | None = None


def stored_contexts(path: Path, verify: bool = False) -> list[StoredContext]:
    """Return what a folder has, the longest contexts of each model first; `verify` reads all of every file.

    Raises
    ------
    OSError
        If the folder cannot be read.
    """
    found = []
    for folder in sorted(each for each in path.iterdir() if each.is_dir() and not each.is_symlink()):
        files: dict[str, ContextFile] = {}
        for file in sorted(folder.iterdir()):
            if NAME.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                try:
                    files[file.name] = ContextFile.read(file)
                except (CacheFileError, OSError, KeyError, TypeError, ValueError) as error:
                    found.append(_damaged(file, error))
        found += sorted((_stored(files, file, verify) for file in files.values()), key=lambda each: -each.tokens)
    return found


def _damaged(file: Path, error: Exception) -> StoredContext:
    state = file.lstat()
    return StoredContext(file.parent.name, file.name, 0, 0, state.st_size, state.st_mtime, str(error))


def _stored(files: dict[str, ContextFile], file: ContextFile, verify: bool) -> StoredContext:
    wrong, known = None, tokens_before(files, file) is not None
    if not known:
        wrong = f"it goes on from {file.parent}, which is gone"
    elif verify:
        try:
            with TensorFile(file.path, {"format": [FORMAT], "layout": [LAYOUT]}) as opened:
                opened.verify()
        except (CacheFileError, OSError) as error:
            wrong = str(error)
    own, length = len(file.tokens), file.length if known else 0
    written = file.path.stat().st_mtime
    return StoredContext(file.path.parent.name, file.path.name, length, own, file.nbytes, written, wrong)


def prune_contexts(path: Path, limit: int) -> tuple[int, int]:
    """Remove what is of no use, and then contexts until each model's files have at most `limit` bytes.

    Returns
    -------
    tuple of int
        Files and bytes that are gone.
    """
    before = stored_contexts(path)
    for name in {each.folder for each in before}:
        ContextFolder(path / name, limit).prune()
    left = stored_contexts(path)
    return len(before) - len(left), sum(each.nbytes for each in before) - sum(each.nbytes for each in left)
