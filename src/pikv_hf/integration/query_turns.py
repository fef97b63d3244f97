"""Find out how an attention module's queries are moved behind a prompt, on any architecture that rotates them.

Which channels a module rotates, in which pairs, or whether it does at all, is in its code alone. So a few of a prompt's
tokens go through the module twice, with the rotary embeddings of the prompt's first positions and with those of its
last; the layout by which the queries of one become those of the other is the module's.
"""

import threading
import weakref
from typing import Any

import torch
from torch import nn

from ..allocation.observed_queries import RunningTurn
from ..allocation.query_turn import RotaryLayout, Turn
from ..common.transformers_release import with_cache
from .noted_call import note_attached_call

#: Tokens that are tried, and how far queries may be off, as a share of the largest: a few roundings of bfloat16.
TRIED, TOLERANCE = 4, 0.03

_GIVEN = "position_embeddings"

#: Angles below are no test.
LEAST_ANGLE = 0.5

#: Cosine and sine by position, `(B or 1, T, W)` each.
Embeddings = tuple[torch.Tensor, torch.Tensor]

#: What was found of each module, None where no rotation moves its queries.
_layouts: "weakref.WeakKeyDictionary[nn.Module, RotaryLayout | None]" = weakref.WeakKeyDictionary()

#: The module whose forward runs in this thread, and how its queries are moved.
_running = threading.local()


@torch.compiler.disable
def begin_turn(module: nn.Module, cache: Any, kwargs: dict[str, Any]) -> None:
    """Note how queries of the call of an attention module that begins are moved behind its tokens."""
    turn, alive = _turn(module, kwargs), None if cache is None else weakref.ref(cache)
    # It stays until the next call begins, which may never be, so it keeps nothing alive.
    _running.call = weakref.ref(module), RunningTurn(turn, alive)


@torch.compiler.disable
def running_turn(module: nn.Module) -> RunningTurn | None:
    """Return what :func:`begin_turn` noted of the running call of a module, None if nothing."""
    call = getattr(_running, "call", None)
    return call[1] if call is not None and call[0]() is module else None


def _turn(module: nn.Module, kwargs: dict[str, Any]) -> Turn | None:
    """Return the rotation from the first position of a call to its last, None if it is not known."""
    embeddings, hidden = _embeddings(kwargs), kwargs.get("hidden_states")
    if embeddings is None or not isinstance(hidden, torch.Tensor) or hidden.shape[1] < 2:
        return None
    if module not in _layouts:
        if (tried := _tried(module, hidden, embeddings, kwargs)) is None:
            return None
        _layouts[module] = _layout(*tried)
    if (layout := _layouts[module]) is None:
        return None
    return _between(embeddings, slice(0, 1), slice(-1, None)).by(layout)


def _embeddings(kwargs: dict[str, Any]) -> Embeddings | None:
    """Return the rotary embeddings that an attention module is given; Llama 4 and DeepSeek-V2 have complex ones."""
    given = kwargs.get(_GIVEN)
    if isinstance(given, torch.Tensor) and given.is_complex() and given.ndim == 3:
        return given.real, given.imag
    if not isinstance(given, tuple) or len(given) != 2:
        return None
    cos, sin = given
    known = all(isinstance(part, torch.Tensor) and part.ndim == 3 and part.is_floating_point() for part in given)
    return (cos, sin) if known else None


def _at(given: Any, row: int, columns: slice) -> Any:
    """Return rotary embeddings, as they were given, of some columns of a row."""
    if isinstance(given, tuple):
        return tuple(_at(part, row, columns) for part in given)
    return given[row if given.shape[0] > 1 else 0, columns][None]


def _between(embeddings: Embeddings, start: slice, end: slice) -> Turn:
    cos, sin = embeddings
    return Turn.between((cos[:, start], sin[:, start]), (cos[:, end], sin[:, end]))


def _tried(
    module: nn.Module, hidden: torch.Tensor, embeddings: Embeddings, kwargs: dict[str, Any]
) -> tuple[Turn, torch.Tensor, torch.Tensor] | None:
    """Return the queries of a few tokens at early and at late positions, and the turn between; None if that fails."""
    count = min(TRIED, hidden.shape[1] // 2)
    starts, ends = slice(0, count), slice(hidden.shape[1] - count, None)
    turns = _between(embeddings, starts, ends)
    # A row of padding has the same position everywhere.
    row = int(turns.sin.abs().sum(dim=(1, 2)).argmax())
    turn = Turn(turns.cos[row : row + 1], turns.sin[row : row + 1], turns.layout)
    if float(turn.sin.abs().max()) < LEAST_ANGLE:
        return None
    tokens = _at(hidden, row, starts)
    try:
        early, late = (_queries(module, tokens, _at(kwargs[_GIVEN], row, at), kwargs) for at in (starts, ends))
    except Exception:
        # A module that wants more of a call than what is its own, somebody's hook that does, or no memory just now.
        return None
    return turn, early, late


def _layout(turn: Turn, early: torch.Tensor, late: torch.Tensor) -> RotaryLayout | None:
    """Return the layout by which a turn makes late queries of early ones, None if there is none."""
    errors = {layout: _error(turn.by(layout), early, late) for layout in RotaryLayout.all()}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= TOLERANCE * float(late.abs().max()) else None


def _error(turn: Turn, early: torch.Tensor, late: torch.Tensor) -> float:
    try:
        return float((turn(early) - late.float()).abs().max())
    except (ValueError, RuntimeError):
        # More angles than channels.
        return float("inf")


def _queries(module: nn.Module, hidden: torch.Tensor, embeddings: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the queries `(1, Hq, n, D)` of some tokens at positions with these embeddings."""
    noted: list[torch.Tensor] = []
    given = {name: value for name, value in kwargs.items() if name not in ("position_ids", "cache_position")}
    given |= {"hidden_states": hidden, _GIVEN: embeddings, "attention_mask": None}
    note_attached_call(module, with_cache(given, None), lambda query, mask, more: noted.append(query))
    return noted[0]
