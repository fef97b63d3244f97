"""Which KV heads look things up: found on text with a passkey, from the model itself."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf.allocation.observed_queries import attention_mass
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.integration.attachment import attach
from pikv_hf.presses.observed_queries import is_watched, observed, unwatch, watch


@dataclass(frozen=True)
class HeadScores:
    """Attention that each KV head pays to a passkey far back, by layer index.

    Attributes
    ----------
    layers : dict
        From layer index to the scores of its KV heads, a share of attention between 0 and 1.
    model_type : str
        For messages.
    """

    layers: dict[int, tuple[float, ...]]
    model_type: str

    def flat(self) -> list[tuple[float, int, int]]:
        """Return `(score, layer, head)` of all heads, lowest first."""
        return sorted((score, layer, head) for layer, row in self.layers.items() for head, score in enumerate(row))

    def lowest(self, number: int, layer: int) -> torch.Tensor:
        """Return which heads of a layer are among the `number` lowest of the model, `(H,)` bool."""
        chosen = {head for _, index, head in self.flat()[:number] if index == layer}
        return torch.tensor([head in chosen for head in range(len(self.layers[layer]))])

    def shape(self) -> str:
        """Return layers and KV heads, `4 x 8`."""
        return f"{len(self.layers)} x {max(map(len, self.layers.values()), default=0)}"

    def fits(self, model: Any) -> bool:
        """Return whether the scores are of a model of these layers and heads; layers that slide have none."""
        text = model.config.get_text_config(decoder=True)
        bounded = [layer.is_sliding for layer in DynamicCache(config=text).layers]
        _, heads = layers_and_heads(model)
        return (
            self.model_type == text.model_type
            and set(self.layers) == {index for index, slides in enumerate(bounded) if not slides}
            and all(len(row) == heads for row in self.layers.values())
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain values."""
        return {"model_type": self.model_type, "layers": {str(index): list(row) for index, row in self.layers.items()}}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "HeadScores":
        """Build scores from :meth:`to_dict`'s result."""
        return cls(
            {int(index): tuple(map(float, row)) for index, row in saved["layers"].items()}, str(saved["model_type"])
        )


def layers_and_heads(model: Any) -> tuple[int, int]:
    """Return the layers of a model and the KV heads of each."""
    text = model.config.get_text_config(decoder=True)
    return text.num_hidden_layers, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


@torch.no_grad()
def find_head_scores(
    model: Any, *, samples: int = 8, tokens: int = 512, passkey: int = 16, seed: int = 0
) -> HeadScores:
    """Score the KV heads of a model by what they look at where a passkey is repeated.

    A text of random tokens holds a passkey of random tokens early on, and ends with the passkey once more. While the
    model reads it again, a head that looks things up attends to the first occurrence, or to what followed the current
    token there; the score is that share of its attention, the highest over its query heads' mean. DuoAttention finds
    the same by optimising gates on synthetic passkeys; this needs a few forward passes.

    Parameters
    ----------
    model : PreTrainedModel
        In any state; it is left as it was.
    samples, tokens, passkey : int
        Texts, tokens of each, and tokens of the passkey.
    seed : int
        Of the texts.
    """
    text = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(seed)
    special = {x for x in (text.bos_token_id, text.eos_token_id, text.pad_token_id) if isinstance(x, int)}
    tokens = min(tokens, getattr(text, "max_position_embeddings", tokens))
    ids = torch.randint(0, text.vocab_size, (samples, tokens), generator=generator)
    for token in special:
        ids = ids.masked_fill(ids == token, (max(special) + 1) % text.vocab_size)
    start = tokens // 8
    ids[:, -passkey:] = ids[:, start : start + passkey]
    with attach(model, "hash") as attachment:
        modules = attachment.attention_modules()
        watched = is_watched(modules)
        watch(model)
        try:
            cache = _read(model, ids.to(model.device))
            layers = {}
            for index, module in modules.items():
                if cache.layers[index].is_sliding:
                    continue
                observer = observed(module)
                assert observer.recent is not None
                count = len(observer.recent.positions)
                last = observer.recent.pick(torch.arange(count - passkey // 2, count, device=model.device))
                mass = attention_mass(observer, last, cache.layers[index].keys)
                found = mass[:, :, start : start + passkey].sum(dim=-1).mean(dim=0)
                layers[index] = tuple(round(float(score), 5) for score in found)
        finally:
            if not watched:
                unwatch(modules)
    return HeadScores(layers, text.model_type)


def _read(model: Any, ids: torch.Tensor) -> Any:
    cache = DynamicCache(config=model.config)
    getattr(model, "model", model)(input_ids=ids, **cache_argument(cache))
    return cache
