"""Prose and code for a pretrained model to read: the bundled essays, and source of Python's standard library."""

import dataclasses
import hashlib
import importlib
from pathlib import Path
from typing import Any

import torch

from pikv_hf.eval.tasks.ruler import Haystack

#: Modules of the standard library whose source is read, one after the other.
MODULES = ("difflib", "statistics", "textwrap", "heapq")


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """A text and how to find it again.

    Attributes
    ----------
    name : str
        `"prose"` or `"code"`.
    content : str
        All of it.
    source : str
        Where it comes from.
    """

    name: str
    content: str
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of its UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def ids(self, tokenizer: Any) -> torch.Tensor:
        """Return its tokens, `(N,)` int64."""
        encoded = tokenizer(self.content, add_special_tokens=False, return_tensors="pt", verbose=False)
        return encoded.input_ids[0]


def prose() -> Text:
    """Return the essays that were written for this project: no model was trained on them."""
    return Text("prose", Haystack.bundled().text, "the bundled essays")


def code() -> Text:
    """Return source of the standard library of the Python that runs; another release has another digest."""
    files = [Path(str(importlib.import_module(name).__file__)) for name in MODULES]
    source = ", ".join(file.name for file in files)
    return Text(
        "code", "\n\n".join(file.read_text(encoding="utf-8") for file in files), f"the standard library: {source}"
    )


def texts() -> tuple[Text, ...]:
    """Return both."""
    return prose(), code()
