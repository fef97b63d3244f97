"""What evicting each token of the layers of a cache would cost, by what is known of it when a budget decides."""

from collections.abc import Mapping, Sequence

import torch

from ..allocation.observed_queries import Observed, Observer
from ..allocation.output_projection import gram_of
from ..allocation.token_loss import token_loss
from ..allocation.token_widths import LayerTokens
from .layer_edits import LayerEdits
from .press_eviction import packed_pages

#: A call of fewer tokens does not tell how well they would be recalled: what follows most of them is not known yet.
LEAST_RECALLED = 16


def judged_layers(members: Sequence[LayerEdits], observers: Mapping[int, Observer]) -> list[LayerTokens]:
    """Return what is known of the tokens of layers, with what losing each would cost.

    Where it is known of all layers how well tokens would be recalled, or of some of their tokens, that counts
    everywhere: losses by recall and by the latest queries' attention cannot be compared. Without any queries, as of
    tokens that came by `cache.update`, the values alone count.

    Parameters
    ----------
    members : sequence of LayerEdits
        Of the layers.
    observers : Mapping
        By layer, what the call has told whose tokens wait.
    """
    recalled = [_known_recall(each, observers.get(each.layer_idx)) for each in members]
    by_recall = all(each is not None for each in recalled)
    return [
        _judged(each, observers.get(each.layer_idx), known if by_recall else None)
        for each, known in zip(members, recalled, strict=True)
    ]


def _known_recall(member: LayerEdits, observer: Observer | None) -> torch.Tensor | None:
    """Return how well a layer's tokens would be recalled, `(B, H, T)` float32, NaN where unknown; None if all are."""
    seen, scheduler = member.store.state.seen, member.store.parts[0].scheduler
    if observer is not None and observer.recalled is not None and observer.recalled.shape[2] == seen:
        # Of the call itself, as it was found.
        return observer.recalled
    recall = None if scheduler is None else scheduler.recall
    if recall is None or recall.first.shape[0] != member.store.batch or not len(recall.masses):
        return None
    return recall.mass(seen)


def _judged(member: LayerEdits, observer: Observer | None, recalled: torch.Tensor | None) -> LayerTokens:
    """Return what is known of the tokens of a layer."""
    store, link = member.store, member.link
    assert link is not None
    keys, values = member.latents.dense_pair()
    stored = member.latents.stored_mask()
    module = link.attention_of(store.layer_idx)
    assert module is not None
    judge = _latest_queries(member) if observer is None or observer.recent is None else observer
    query_heads = _query_heads(member, judge)
    loss = token_loss(judge, gram_of(module, query_heads, values.shape[-1]), keys, values, stored, recalled)
    return LayerTokens.of(keys, values, stored, loss, packed_pages(store))


def _latest_queries(member: LayerEdits) -> Observer:
    """Return the queries that a layer's scheduler remembers, as one that has seen all that is stored."""
    scheduler, observer = member.store.parts[0].scheduler, Observer()
    assert scheduler is not None
    queries = scheduler.queries
    if queries is not None and len(queries) == member.store.batch:
        # Scaled already; all of what is stored came before them, or nearly so.
        observer.recent = Observed(queries, torch.arange(queries.shape[2], device=queries.device), None)
        observer.softcap, observer.sinks = scheduler.softcap, scheduler.logit_sinks
    observer.seen = -1
    return observer


def _query_heads(member: LayerEdits, judge: Observer) -> int:
    if judge.recent is not None:
        return judge.recent.queries.shape[1]
    scheduler = member.store.parts[0].scheduler
    assert scheduler is not None
    return int(member.store.heads * scheduler.query_groups)
