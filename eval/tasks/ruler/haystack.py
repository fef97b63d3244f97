"""Hold the text that needles are hidden in, cut into sentences or paragraphs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, pairwise
from pathlib import Path
from random import Random

_SUFFIXES = (".txt", ".md")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]*[A-Z0-9])")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_NEEDLE = re.compile(r"special\s+magic\s+(number|uuid)", re.IGNORECASE)


def data_folder() -> Path:
    """Folder of the essays and question sets written for this project."""
    return Path(__file__).with_name("data")


@dataclass(frozen=True, slots=True)
class Haystack:
    """Sentences of running text.

    A sample reads on from a random sentence and starts over at the end, so a context that is longer than the text
    repeats it: the bundled essays are about 14,000 words long.

    Attributes
    ----------
    sentences : tuple of str
        Sentences in order, on one line each.
    """

    sentences: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.sentences:
            raise ValueError("a haystack needs at least one sentence, got none")

    @classmethod
    def bundled(cls) -> "Haystack":
        """The essays written for this project."""
        return cls(_sentences(sorted(data_folder().glob("essay_*.txt"))))

    @classmethod
    def read(cls, path: str | Path) -> "Haystack":
        """Read one text file, or all `.txt` and `.md` files of a folder in order of their names.

        Raises
        ------
        FileNotFoundError
            If there is no such file or folder, or no text file in the folder.
        ValueError
            If a file cannot be read, is empty, is not UTF-8, or holds a sentence like a needle; the message names it.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"haystack {path}: no such file or folder")
        return cls(_sentences(_text_files(path) if path.is_dir() else [path]))

    @property
    def text(self) -> str:
        """All sentences, joined by spaces."""
        return " ".join(self.sentences)

    def from_random(self, rng: Random) -> Iterator[str]:
        """Sentences from a random one on, endlessly."""
        start = rng.randrange(len(self.sentences))
        return chain(islice(self.sentences, start, None), cycle(self.sentences))

    def documents(self, rng: Random) -> Iterator[str]:
        """Passages of five to nine sentences, one after the other from a random place, endlessly."""
        sentences = self.from_random(rng)
        while True:
            yield " ".join(islice(sentences, rng.randint(5, 9)))


def _text_files(folder: Path) -> list[Path]:
    """The text files of `folder`, sorted by name."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise FileNotFoundError(f"haystack {folder}: no file ending in {' or '.join(_SUFFIXES)}")
    return files


def _sentences(files: Sequence[Path]) -> tuple[str, ...]:
    """The sentences of all files."""
    return tuple(chain.from_iterable(split_sentences(_read(file)) for file in files))


def _read(file: Path) -> str:
    """The text of one file, checked."""
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack {file}: expected UTF-8, found byte {error.object[error.start]:#04x}") from error
    except OSError as error:
        raise ValueError(f"haystack {file}: cannot be read, {error.strerror}") from error
    if not content.strip():
        raise ValueError(f"haystack {file}: the file is empty, expected text")
    if found := _NEEDLE.search(content):
        line = content.count("\n", 0, found.start()) + 1
        raise ValueError(f"haystack {file}, line {line}: {found.group()!r} reads like a needle, expected plain text")
    return content


def split_sentences(content: str) -> list[str]:
    """Split running text at empty lines, and after `.`, `!` or `?` before a capital or digit.

    All other white space becomes single spaces. What is no sentence by itself, such as a heading, counts as one.
    """
    return [sentence for paragraph in _PARAGRAPH_END.split(content) for sentence in _split_paragraph(paragraph)]


def _split_paragraph(paragraph: str) -> Iterator[str]:
    """The sentences of one paragraph, none of them empty."""
    flat = " ".join(paragraph.split())
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(flat)), len(flat)]
    return (flat[start:end].rstrip() for start, end in pairwise(starts) if start < end)
