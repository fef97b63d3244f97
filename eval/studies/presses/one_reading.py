"""Read a prompt once and let many presses compress it, each as if it were alone.

A press of kvpress acts in a forward hook of every attention, on the layer of the cache that this has just filled. What
it sees there does not depend on other layers having been compressed: all of a prompt's attention is over fresh K/V. So
one reading serves all presses at all ratios, each with a cache of its own that shares the K/V until the press replaces
them.
"""

import dataclasses
import logging
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from pikv_hf.common.transformers_release import cache_argument, with_cache
from pikv_hf.eval.runner.press_phases import PressPhases
from pikv_hf.eval.studies.presses.remembered_scores import RememberedScores
from pikv_hf.integration.kvpress_marks import MARKS
from pikv_hf.presses.press_base import KVPRESS, decoder_of

logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class Kept:
    """What a press left of a prompt.

    Attributes
    ----------
    cache : DynamicCache
        Keys and values `(1, H, n, D)` per layer, as the press left them; what it only hides is in there.
    hidden : list
        Per layer the tokens `(1, H, n)` that the press marked to be passed over, None where there are none.
    position : int
        Of the token that comes next.
    """

    cache: DynamicCache
    hidden: list[torch.Tensor | None]
    position: int

    @property
    def hides(self) -> bool:
        """Whether heads keep tokens of their own, which only a `PiKVCache` frees."""
        return any(marks is not None for marks in self.hidden)


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """A prompt that was read once.

    Attributes
    ----------
    full : DynamicCache
        All of it.
    kept : dict
        What each press left, under its key.
    refused : dict
        Why others could not, under theirs.
    logits : torch.Tensor
        `(1, V)`, of the token that follows.
    """

    full: DynamicCache
    kept: dict[Any, Kept]
    refused: dict[Any, str]
    logits: torch.Tensor


def shares_a_reading(press: Any) -> bool:
    """Return whether a press acts in the hooks of a prompt alone, as kvpress's base class has it."""
    return isinstance(press, KVPRESS.BasePress) and type(press).__call__ is KVPRESS.BasePress.__call__


@torch.no_grad()
def read_once(model: Any, ids: torch.Tensor, presses: Mapping[Any, Any], seed: int = 0) -> Reading:
    """Read a prompt `(1, T)` and compress it by every press.

    Parameters
    ----------
    model : PreTrainedModel
        With another attention than `eager`.
    ids : torch.Tensor
        The prompt.
    presses : mapping
        From keys to presses that :func:`shares_a_reading`. One that fails is left out, with its error.
    seed : int
        Of presses that draw at random: with it and the layer's index each layer begins anew.
    """
    full = DynamicCache(config=model.config)
    layers = model.config.num_hidden_layers
    kept = {key: Kept(DynamicCache(), [None] * layers, ids.shape[1]) for key in presses}
    refused: dict[Any, str] = {}
    scores = RememberedScores()

    def act(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        index = int(module.layer_idx)  # type: ignore[arg-type]
        layer = full.layers[index]
        versions = layer.keys._version, layer.values._version
        scores.forget()
        for key, press in presses.items():
            if key in refused:
                continue
            with _refusing(refused, key), torch.random.fork_rng():
                torch.manual_seed(seed + index)
                _compress(press, kept[key], layer, module, args, kwargs, output)
            if (layer.keys._version, layer.values._version) != versions:
                raise RuntimeError(f"{key}: the press changes keys or values in place, which others share")

    with ExitStack() as stack:
        for key, press in presses.items():
            with _refusing(refused, key):
                press.post_init_from_model(model)
        stack.enter_context(scores.of(presses.values()))
        stack.enter_context(_hooked(model, act))
        hidden = model.model(input_ids=ids, **cache_argument(full)).last_hidden_state
    left = {key: each for key, each in kept.items() if key not in refused}
    for key, each in left.items():
        if PressPhases.of(presses[key]).renumbers:
            each.position = each.cache.layers[0].keys.shape[2]
    return Reading(full, left, refused, model.lm_head(hidden[:, -1]))


def _compress(
    press: Any, kept: Kept, layer: Any, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
) -> None:
    """Let a press act on a layer of its own, which holds what the prompt's layer holds."""
    index = int(module.layer_idx)  # type: ignore[arg-type]
    kept.cache.layers.append(layer_of(layer.keys, layer.values))
    setattr(module, MARKS, None)
    try:
        press.forward_hook(module, args, with_cache(kwargs, kept.cache), output)
        kept.hidden[index] = marked(module, layer.keys)
    finally:
        setattr(module, MARKS, None)


def layer_of(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    """Return a layer of a cache that holds these `(1, H, n, D)`, without a copy."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def marked(module: nn.Module, keys: torch.Tensor) -> torch.Tensor | None:
    """Return what a press of kvpress has marked of keys `(1, H, n, D)` as `(1, H, n)` bool, None if nothing."""
    marks = getattr(module, MARKS, None)
    if marks is None:
        return None
    hidden = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
    hidden[tuple(marks)] = True
    return hidden


@contextmanager
def _refusing(refused: dict[Any, str], key: Hashable) -> Iterator[None]:
    """Note what ends a press: others go on."""
    try:
        yield
    except Exception as error:
        refused[key] = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("%s: %s", key, refused[key])


@contextmanager
def _hooked(model: Any, act: Callable[..., None]) -> Generator[None, None, None]:
    """Call a function after each attention; presses find the rotary embedding there, where kvpress puts it."""
    decoder = decoder_of(model)
    handles = []
    try:
        for layer in decoder.layers:
            layer.self_attn.rotary_emb = decoder.rotary_emb
            handles.append(layer.self_attn.register_forward_hook(act, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
