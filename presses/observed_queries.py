"""Queries as attention used them, noted while the model reads: after rotary embedding, norms and everything else.

kvpress projects hidden states to queries a second time and forgets norms on models it does not know, such as Qwen3-MoE.
Here PiKV's attention function hands over what it was given, at no cost, on any architecture that it can be attached to.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from pikv_hf.common.foreign_attributes import OBSERVER_ATTRIBUTE
from pikv_hf.common.transformers_release import INSTALLED, cache_of_call, with_cache
from pikv_hf.integration.attachment import ensure_attached
from pikv_hf.integration.attention_implementation import ATTENTION_NAME
from pikv_hf.integration.latent_attention import expands_latents
from pikv_hf.layer.mask_columns import new_tokens_valid

#: Queries kept per layer, the latest ones.
RECENT = 64

_NOTING = "pikv-noting"


@dataclass(frozen=True, slots=True)
class Observed:
    """Some queries of one attention layer.

    Attributes
    ----------
    queries : torch.Tensor
        `(B, Hq, m, D)`.
    positions : torch.Tensor
        `(m,)` int64, ascending: the column of each query's own token.
    valid : torch.Tensor or None
        `(B, m)` bool, False for queries of padding; None if there is none.
    """

    queries: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor | None

    def pick(self, index: torch.Tensor) -> "Observed":
        """Return the queries at `index` `(n,)`, copied."""
        valid = None if self.valid is None else self.valid[:, index]
        return Observed(self.queries[:, :, index], self.positions[index], valid)

    def __add__(self, later: "Observed") -> "Observed":
        valid = None
        if self.valid is not None or later.valid is not None:
            valid = torch.cat([self._known_valid(), later._known_valid()], dim=1)
        return Observed(
            torch.cat([self.queries, later.queries], dim=2), torch.cat([self.positions, later.positions]), valid
        )

    def _known_valid(self) -> torch.Tensor:
        if self.valid is not None:
            return self.valid
        shape = self.queries.shape[0], self.queries.shape[2]
        return torch.ones(shape, dtype=torch.bool, device=self.queries.device)


class Observer:
    """Keeps the latest queries of one attention module.

    Attributes
    ----------
    recent : Observed or None
        The latest queries.
    scale : float
        What attention multiplies logits by.
    sinks : torch.Tensor or None
        `(Hq,)` logits of attention sinks, as gpt-oss has them.
    softcap : float or None
        Where logits are capped by `softcap * tanh(logits / softcap)`.
    batch, new, seen : int
        Rows and new tokens of the last call, and tokens read so far.
    calls : int
        How often attention has run.
    """

    def __init__(self) -> None:
        self.recent: Observed | None = None
        self.scale, self.batch, self.new, self.seen, self.calls = 1.0, 0, 0, 0, 0
        self.sinks: torch.Tensor | None = None
        self.softcap: float | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Observer":
        """Return the observer of an attention module, a new one if it has none."""
        observer = getattr(module, OBSERVER_ATTRIBUTE, None)
        if not isinstance(observer, cls):
            observer = cls()
            setattr(module, OBSERVER_ATTRIBUTE, observer)
        return observer

    def __call__(
        self,
        query: torch.Tensor,
        past: int,
        valid: torch.Tensor | None,
        scale: float,
        sinks: torch.Tensor | None,
        softcap: float | None,
    ) -> None:
        """Note the queries `(B, Hq, Q, D)` of a call after `past` tokens; `valid` `(B, Q)` is False for padding."""
        new = query.shape[2]
        self.batch, self.new = query.shape[0], new
        self.calls += 1
        if past == 0:
            self.recent = None
        self.scale, self.sinks, self.softcap, self.seen = scale, sinks, softcap, past + new
        call = Observed(query.detach(), torch.arange(past, past + new, device=query.device), valid)
        latest = call.pick(torch.arange(max(0, new - RECENT), new, device=query.device))
        joined = latest if self.recent is None else self.recent + latest
        self.recent = joined.pick(torch.arange(len(joined.positions), device=query.device)[-RECENT:])


def observed(module: nn.Module, call: dict[str, Any] | None = None) -> Observer:
    """Return what was observed at an attention module.

    Parameters
    ----------
    module : nn.Module
        The attention.
    call : dict, optional
        The arguments of its last call. Some wrappers of kvpress do not tell the press within of the model, so that
        nothing was observed; the queries of this call are then made again.

    Raises
    ------
    RuntimeError
        If nothing was observed and no call is given.
    """
    observer = getattr(module, OBSERVER_ATTRIBUTE, None)
    config: Any = getattr(module, "config", None)
    # An observer may be left from a time when the model was attached.
    if isinstance(observer, Observer) and observer.recent is not None and attends_by_pikv(config):
        return observer
    if call is not None and "hidden_states" in call:
        return _observed_again(module, config, call)
    raise RuntimeError(
        f"no queries of {type(module).__name__} {getattr(module, 'layer_idx', '')} were observed; a press has to "
        "be entered with `with press(model):`, and the model must keep attn_implementation='pikv' meanwhile"
    )


def attends_by_pikv(config: Any) -> bool:
    """Return whether a model of this config calls PiKV's attention function, which observes."""
    return getattr(config, "_attn_implementation", ATTENTION_NAME) == ATTENTION_NAME


@torch.no_grad()
def _observed_again(module: nn.Module, config: Any, call: dict[str, Any]) -> Observer:
    """Run an attention module without a cache, up to where it attends."""
    observer = Observer()
    known = {name: value for name, value in call.items() if name != "pikv_stored"}
    arguments = {**with_cache(known, None), "pikv_note": partial(_note, observer, _columns_before(module, call))}
    implementation = config._attn_implementation
    AttentionInterface.register(_NOTING, _note_only)
    config._attn_implementation = _NOTING
    try:
        module.forward(**arguments)
    finally:
        config._attn_implementation = implementation
    return observer


def _columns_before(module: nn.Module, call: dict[str, Any]) -> int:
    """Return how many columns a layer of a cache has before those of the call that has just been made."""
    layers = getattr(cache_of_call(call), "layers", None)
    # A row of a batch, taken out of it, is a prompt and in no cache.
    count = None if layers is None else getattr(layers[module.layer_idx], "get_seq_length", None)
    return 0 if count is None else max(0, int(count()) - call["hidden_states"].shape[1])


def _note(observer: Observer, past: int, query: torch.Tensor, mask: torch.Tensor | None, given: dict[str, Any]) -> None:
    scale = query.shape[-1] ** -0.5 if given.get("scaling") is None else given["scaling"]
    observer(query, past, new_tokens_valid(mask, query.shape[2]), scale, given.get("s_aux"), given.get("softcap"))


def _note_only(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **given: Any
) -> tuple[torch.Tensor, None]:
    """Stand in for an attention function of transformers: hand over the queries and attend to nothing."""
    given["pikv_note"](query, mask, given)
    return query.new_zeros((*query.transpose(1, 2).shape[:3], value.shape[-1])), None


def watch(model: Any) -> None:
    """Attach a model and observe its queries from now on.

    Presses within kvpress's wrappers are told of the model but not when they end; what is kept is small.
    """
    attachment = ensure_attached(model, "hash")
    check_has_keys(attachment.attention_modules())
    for module in attachment.attention_modules().values():
        Observer.of(module)


def check_has_keys(modules: dict[int, nn.Module]) -> None:
    """Raise `NotImplementedError` for attention whose tokens no press can score yet: latents, and what is indexed."""
    if chooses := [type(each).__name__ for each in modules.values() if getattr(each, "indexer", None) is not None]:
        raise NotImplementedError(
            f"{chooses[0]} reads the tokens that an indexer of its own chooses among all of them, those too that a "
            "press has evicted; the codecs of PiKVCache work there"
        )
    if latent := [type(module).__name__ for module in modules.values() if expands_latents(type(module))]:
        raise NotImplementedError(
            f"{latent[0]} is latent attention, of which transformers {INSTALLED} caches latents, not the keys and "
            "values that presses score; budget= and the codecs of PiKVCache work with them"
        )


def is_watched(modules: dict[int, nn.Module]) -> bool:
    """Return whether any of these attention modules is observed."""
    return any(isinstance(getattr(module, OBSERVER_ATTRIBUTE, None), Observer) for module in modules.values())


def unwatch(modules: dict[int, nn.Module]) -> None:
    """Undo :func:`watch`, but for the attachment."""
    for module in modules.values():
        if hasattr(module, OBSERVER_ATTRIBUTE):
            delattr(module, OBSERVER_ATTRIBUTE)


def attention_mass(
    observer: Observer, queries: Observed, keys: torch.Tensor, stored: torch.Tensor | None = None, causal: bool = True
) -> torch.Tensor:
    """Return the attention that observed queries pay to each key, averaged over the queries that see it.

    Parameters
    ----------
    observer : Observer
        Scale, sinks and soft cap.
    queries : Observed
        Which queries.
    keys : torch.Tensor
        `(B, H, T, D)`.
    stored : torch.Tensor, optional
        `(B, H, T)` bool, False for padding and what was evicted.
    causal : bool
        Whether key t is the token at position t, which earlier queries do not see; else all queries see all keys.

    Returns
    -------
    torch.Tensor
        `(B, H, T)` float32, averaged over the query heads of a KV head; 0 where nothing is stored or seen.
    """
    batch, heads, tokens, _ = keys.shape
    groups = queries.queries.shape[1] // heads
    column = torch.arange(tokens, device=keys.device)
    seen = column <= queries.positions[:, None] if causal else torch.ones_like(column <= queries.positions[:, None])
    seen = seen.expand(batch, -1, -1)
    if queries.valid is not None:
        seen = seen & queries.valid[..., None]
    mass = keys.new_empty((batch, heads, tokens), dtype=torch.float32)
    for head in range(heads):
        visible = seen if stored is None else seen & stored[:, head, None]
        own = slice(head * groups, (head + 1) * groups)
        logits = torch.matmul(queries.queries[:, own].float(), keys[:, head, None].float().transpose(-1, -2))
        logits.mul_(observer.scale)
        if observer.softcap is not None:
            logits.div_(observer.softcap).tanh_().mul_(observer.softcap)
        logits.masked_fill_(~visible[:, None], -torch.inf)
        total = logits.logsumexp(dim=-1, keepdim=True)
        if observer.sinks is not None:
            total = torch.logaddexp(total, observer.sinks[own].float().view(1, -1, 1, 1).expand_as(total))
        # A query that sees nothing, as one of padding, has no total.
        weights = logits.sub_(total.masked_fill(total == -torch.inf, 0)).exp_()
        mass[:, head] = weights.sum(dim=2).mean(dim=1) / visible.sum(dim=1).clamp_min(1)
    return mass
