"""Presses that read a prompt once more to score its tokens, at all ratios from that one further reading.

KVzip and KVgrad have the model repeat the prompt, KVCompose reads it twice with `eager` attention. What they score does
not depend on how much is to go, so a ratio only has to choose: the press's own last step, taken for one press after the
other. That reaches into kvpress 0.5.5; tests compare what is kept with what each press alone keeps.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.studies.presses.one_reading import Kept, layer_of, marked
from pikv_hf.integration.kvpress_marks import MARKS
from pikv_hf.presses.press_base import KVPRESS, decoder_of


def reads_further(press: Any) -> bool:
    """Return whether a press reads a prompt more than once, in a way that is known here."""
    return isinstance(press, KVPRESS.KVzipPress | KVPRESS.KVComposePress)


def read_further(model: Any, ids: torch.Tensor, full: DynamicCache, presses: Mapping[Any, Any]) -> dict[Any, Kept]:
    """Return what presses leave that differ in nothing but their ratio.

    Parameters
    ----------
    model : PreTrainedModel
        Whose tokenizer is found where its config says.
    ids : torch.Tensor
        The prompt `(1, T)`.
    full : DynamicCache
        The prompt as the model read it; not changed.
    presses : mapping
        From keys to presses for which :func:`reads_further`.
    """
    first = next(iter(presses.values()))
    if isinstance(first, KVPRESS.KVComposePress):
        return _composed(model, ids, presses)
    return _repeated(model, ids, full, presses)


def _repeated(model: Any, ids: torch.Tensor, full: DynamicCache, presses: Mapping[Any, Any]) -> dict[Any, Kept]:
    """KVzip, KVzip+ and KVgrad: score while the model repeats the prompt."""
    own, scorer = DynamicCache(), copy.copy(next(iter(presses.values())))
    own.layers = [layer_of(layer.keys, layer.values) for layer in full.layers]
    kept: dict[Any, Kept] = {}

    def choose(_: Any) -> None:
        for key, press in presses.items():
            press.score_val = scorer.score_val.clone()
            press.compress_post(model)
            kept[key] = _kept_of_marks(model, full, ids.shape[1])

    scorer.compress_post = choose
    with torch.no_grad(), scorer(model):
        # What its wrapper of the decoder would note of a prompt, which has been read already.
        scorer._context_ids, scorer._cache = ids, own
    return kept


def _kept_of_marks(model: Any, full: DynamicCache, tokens: int) -> Kept:
    hidden = []
    for layer, stored in zip(decoder_of(model).layers, full.layers, strict=True):
        hidden.append(marked(layer.self_attn, stored.keys))
        setattr(layer.self_attn, MARKS, None)
    return Kept(full, hidden, tokens)


def _composed(model: Any, ids: torch.Tensor, presses: Mapping[Any, Any]) -> dict[Any, Kept]:
    """KVCompose: its own `eager` readings, whose attention is the score."""
    scorer, cache = copy.copy(next(iter(presses.values()))), DynamicCache(config=model.config)
    kept: dict[Any, Kept] = {}

    def choose(_: Any) -> None:
        for key, press in presses.items():
            scorer.compression_ratio = press.compression_ratio
            scorer.prepare_important_masks()
            layers = [
                layer_of(*(_chosen(part[:, :, : ids.shape[1]], masks) for part in (layer.keys, layer.values)))
                for layer, masks in zip(cache.layers, scorer.important_mask_per_kv_head, strict=True)
            ]
            kept[key] = Kept(DynamicCache(), [None] * len(layers), ids.shape[1])
            kept[key].cache.layers = layers

    scorer.compress_cache = choose
    with torch.no_grad(), scorer(model):
        model.model(input_ids=ids, **cache_argument(cache))
    return kept


def _chosen(part: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """Return `(1, H, n, D)`, of each head of `(1, H, T, D)` what its mask says: equally many, `structured`."""
    return torch.stack([head[mask] for head, mask in zip(part[0], masks, strict=True)])[None]
