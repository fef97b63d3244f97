"""Packages that only some features need: which extra of pikv-hf brings each, and one line about a missing one."""

from collections.abc import Iterator
from contextlib import contextmanager

_EVAL = (
    "PIL",
    "datasets",
    "evaluate",
    "huggingface_hub",
    "jieba",
    "jinja2",
    "matplotlib",
    "pandas",
    "rapidfuzz",
    "rouge",
    "scipy",
    "tokenizers",
    "typer",
    "wonderwords",
    "yaml",
)

#: The modules of each extra, as they are imported; what brings them is in pyproject.toml.
EXTRAS = {
    "kvpress": ("kvpress",),
    "real": ("gguf",),
    "eval": _EVAL,
    "quanto": ("optimum",),
    "cpu": ("numba", "llvmlite"),
}


class MissingExtraError(ModuleNotFoundError):
    """A package that a bare install does not bring is missing; the message is one line with what installs it."""


@contextmanager
def extra(name: str, needed_by: str) -> Iterator[None]:
    """Say which extra is to be installed if one of its packages turns out to be missing.

    The outermost of several decides: who asked for an evaluation is told of the extra for evaluations.

    Parameters
    ----------
    name : str
        Of the extra, a key of :data:`EXTRAS`.
    needed_by : str
        What needs it, for the message: a module or a command.

    Raises
    ------
    MissingExtraError
        Instead of the `ModuleNotFoundError` about a package of the extra; any other error passes.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[name]:
            raise
        raise MissingExtraError(f"{needed_by} needs {package}: {install_command(name)}", name=error.name) from None


def install_command(name: str) -> str:
    """Return what installs an extra: pikv-hf is on no package index."""
    return f'pip install ".[{name}]" in a clone of pikv-hf'
