"""The latents of attention that expands them before it caches: what its projection is given in the running call."""

import dataclasses
import functools
import inspect
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .attention_calls import AttentionCalls
from .latent_attention import expands_before_caching, is_plain
from .latent_code import PROJECTION
from .model_hook import place_hook

_PACKAGE = __name__.partition(".")[0] + "."


@dataclasses.dataclass(frozen=True, slots=True)
class LatentExpansion:
    """How latents and rotary keys become keys and values of all heads: by a projection that a model has, or had.

    Attributes
    ----------
    stored : tuple of int
        `(1, R, Dr)`: heads, latent and rotary channels as they are stored.
    expanded : tuple of int
        `(H, Dn + Dr, Dv)`: heads and channels of keys and values.
    """

    stored: tuple[int, int, int]
    expanded: tuple[int, int, int]
    _projection: "weakref.ref[nn.Linear]"
    # Of one that latents are stored by: kept alive, with what tells whether its weights are those of then.
    _kept: nn.Linear | None = dataclasses.field(default=None, compare=False)
    _made_with: Any = dataclasses.field(default=None, compare=False)

    @classmethod
    def of(cls, module: Any) -> "LatentExpansion | None":
        """Return that of an attention module, None with a single head: latents would have to be told from its keys."""
        projection = getattr(module, PROJECTION)
        rotary, values = module.qk_rope_head_dim, module.v_head_dim
        heads = projection.out_features // (module.qk_nope_head_dim + values)
        expanded = heads, module.qk_nope_head_dim + rotary, values
        return None if heads == 1 else cls((1, projection.in_features, rotary), expanded, weakref.ref(projection))

    def held(self) -> "LatentExpansion":
        """Return this for latents that are stored: it keeps the projection, whatever becomes of the model."""
        projection = self._projection()
        if projection is None:
            return self
        return dataclasses.replace(self, _kept=projection, _made_with=_state(projection))

    def check_unchanged(self) -> None:
        """Raise `RuntimeError` if the projection's weights are not those that the stored latents came with."""
        if self._kept is not None and self._made_with != _state(self._kept):
            raise RuntimeError(
                "the weights of kv_b_proj have changed since this cache got its latents: keys and values of the old "
                "ones cannot be made any more. Begin a new cache, or reset() this one"
            )

    def is_by(self, projection: object) -> bool:
        """Return whether this projection does it."""
        return self._projection() is projection

    def expand(self, latents: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all heads as the attention module makes them of the same latents.

        Parameters
        ----------
        latents, rotary : torch.Tensor
            `(B, 1, T, R)` and `(B, 1, T, Dr)`.

        Returns
        -------
        tuple of torch.Tensor
            `(B, H, T, Dn + Dr)` and `(B, H, T, Dv)`.

        Raises
        ------
        RuntimeError
            If the model is gone, with its projection, or its weights have changed.
        """
        self.check_unchanged()
        if (projection := self._projection()) is None:
            raise RuntimeError(
                "the cache holds latents, and the model whose projection makes keys and values of them is gone"
            )
        heads, key_dim, value_dim = self.expanded
        weight = projection.weight.to(latents.device, latents.dtype)
        halves = nn.functional.linear(latents[:, 0], weight).unflatten(-1, (heads, -1)).transpose(1, 2)
        plain, values = halves.split([key_dim - rotary.shape[-1], value_dim], dim=-1)
        return torch.cat([plain, rotary.expand(-1, heads, -1, -1)], dim=-1), values.contiguous()


def _state(projection: nn.Linear) -> tuple[int, int | None]:
    """Return what is another once the weights of a projection have been replaced or written to."""
    weight = projection.weight
    return weight.data_ptr(), None if weight.is_inference() else weight._version


def _is_called_by(code: Any) -> bool:
    """Return whether this code has called into the package, with nothing in between."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame = frame.f_back
    return frame.f_code is code


class LatentCalls:
    """Notes what the projections of a model's attention modules are given, for the layer of a cache that comes next.

    Parameters
    ----------
    calls : AttentionCalls
        The forwards of the model's attention that run.

    Attributes
    ----------
    expansions : dict
        How the latents of a layer are expanded, by layer, of those whose attention has some.
    """

    def __init__(self, calls: AttentionCalls) -> None:
        self._calls = calls
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self.expansions: dict[int, LatentExpansion] = {}

    def follow(self, modules: dict[int, nn.Module]) -> Iterator[RemovableHandle]:
        """Hook the projections of attention modules, by layer, that expand latents before they are cached."""
        for index, module in modules.items():
            if not expands_before_caching(module) or (expansion := LatentExpansion.of(module)) is None:
                continue
            self._modules[index], self.expansions[index] = weakref.ref(module), expansion
            before = functools.partial(self._note, index)
            yield place_hook(getattr(module, PROJECTION).register_forward_pre_hook, before)

    def is_outdated(self) -> bool:
        """Return whether a projection that is hooked is not that of its attention any more."""
        found = ((self.expansions[index], reference()) for index, reference in self._modules.items())
        return not all(known.is_by(getattr(module, PROJECTION, None)) for known, module in found)

    def _note(self, index: int, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls.note_latents(index, args[0] if args else None)

    def of_call(self, layer_idx: int, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the latents and rotary keys of the running call of a layer's attention.

        Parameters
        ----------
        layer_idx : int
            Of the layer.
        keys : torch.Tensor
            `(B, H, Q, Dn + Dr)`, what has become of them.

        Returns
        -------
        tuple of torch.Tensor or None
            `(B, 1, Q, R)` and `(B, 1, Q, Dr)`, in the dtype of the keys; None where nothing is known of them, or where
            attention could not do by them.
        """
        latents, reference = self._calls.take_latents(layer_idx), self._modules.get(layer_idx)
        if latents is None or reference is None or (module := reference()) is None:
            return None
        if not _is_called_by(inspect.unwrap(type(module).forward).__code__):
            # What wraps a cache's `update` may have changed the keys and values.
            return None
        expansion = self.expansions[layer_idx]
        projection: Any = getattr(module, PROJECTION, None)
        _, rank, rotary = expansion.stored
        if not expansion.is_by(projection) or not is_plain(projection):
            return None
        if latents.shape != (keys.shape[0], keys.shape[2], rank) or keys.shape[1] != expansion.expanded[0]:
            return None
        autocast = torch.is_autocast_enabled(keys.device.type)
        if latents.dtype != keys.dtype and not autocast:
            return None
        # Those of all heads, which would live as long as a view of theirs.
        return latents[:, None].to(keys.dtype), keys[:, :1, :, -rotary:].clone()
