"""What a call of a program is: a function that writes lines of Python, and the choices that it has.

What is run is what is printed: a line means the same for DynamicCache and for PiKVCache. The first choice of each
argument is the simplest, which a failing program is reduced to.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

SEEDS = (1, 2, 3, 4)


@dataclasses.dataclass(frozen=True)
class View:
    """What an operation may know when it writes its lines.

    Attributes
    ----------
    batch : int
        Rows.
    length : int
        Columns of `ids` and `mask`: all that the cache has seen, and what `generate` returned last.
    past : int
        Columns that the cache has seen.
    hidden : bool
        Whether the mask hides anything.
    kept : bool
        Whether a twin has been put aside.
    one_attention, windowed, sliding, attached, routed : bool
        Of the model and its cache: whether it can be compared with one attention alone, has layers that see a window
        of the past, drops what has left their window, was made for an attached model, has expert routers.
    eager : bool
        Whether DynamicCache's attention is eager now, which adds boolean masks as numbers.
    autocast : bool
        Whether calls are made under it, unless they say otherwise.
    in_place : bool
        Whether PiKV's attention reads its cache.
    cache_options : dict
        What the cache was made with.
    """

    batch: int
    length: int
    past: int
    hidden: bool
    kept: bool
    one_attention: bool
    windowed: bool
    sliding: bool
    attached: bool
    routed: bool
    eager: bool
    autocast: bool
    in_place: bool
    cache_options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kind of call: what writes its lines, and the choices for each argument of that.

    Attributes
    ----------
    write : callable
        Returns lines, none where the call makes no sense.
    choices : dict of str to tuple
        The choices for each argument; a choice that is named twice is drawn twice as often.
    weight : int
        How often it is drawn, relative to the others.
    """

    write: Callable[..., list[str]]
    choices: dict[str, tuple[Any, ...]]
    weight: int


OPERATIONS: dict[str, Operation] = {}


def operation(weight: int, **choices: tuple[Any, ...]) -> Callable[[Callable[..., list[str]]], Any]:
    """Add a function to the alphabet under its own name."""

    def add(write: Callable[..., list[str]]) -> Callable[..., list[str]]:
        OPERATIONS[write.__name__] = Operation(write, choices, weight)
        return write

    return add
