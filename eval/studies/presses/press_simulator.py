"""Answers of the bundled model from caches that are simulated: any tokens evicted, any through the packed format.

One prefill serves many caches, which are asked together, a row of the batch each.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from pikv_hf.allocation import eviction_loss as utility
from pikv_hf.allocation.bit_allocation import PageCost
from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.tasks import reference
from pikv_hf.eval.tasks.frame import frame
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import Kind

#: Tokens per page.
PAGE = 32

KINDS: dict[int, Kind] = {2: "int2", 4: "int4", 8: "int8"}

_ATTENTION = "pikv_press_search"


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
    """What reading a context of T tokens leaves behind.

    Attributes
    ----------
    sample : EvalSample
        With the context.
    question : torch.Tensor
        `(1, Q)` int64, question and beginning of the answer.
    queries, keys, values : torch.Tensor
        `(L, Hq, T, D)` and `(L, H, T, D)` float32 of L layers, after rotary embedding.
    """

    sample: EvalSample
    question: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def full_bytes(self) -> int:
        """Bytes of keys and values in bf16."""
        return 2 * (self.keys.numel() + self.values.numel())


class Model:
    """The bundled model, with what the rules need to know of it."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_reference_model()
        self.config = self.model.config
        self.scale = self.config.head_dim**-0.5
        weights = [layer.self_attn.o_proj.weight for layer in self.model.model.layers]
        self.grams = [utility.output_gram(weight.detach(), self.config.num_attention_heads) for weight in weights]
        self.cost = PageCost.of_pages(PAGE, self.config.head_dim)

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine `(n, D)` of the rotary embedding at `positions` `(n,)`."""
        cos, sin = self.model.model.rotary_emb(torch.zeros(()), positions[None])
        return cos[0], sin[0]

    def ids(self, text: str) -> torch.Tensor:
        """Return the tokens of a text, `(1, T)` int64."""
        ids: torch.Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids

    def read(self, sample: EvalSample) -> Prefill:
        """Read a context as `pikv eval` does."""
        before, between = frame(self.tokenizer)
        seen: list[tuple[torch.Tensor, ...]] = []

        def attend(module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
            seen.append((query[0].clone(), key[0].clone(), value[0].clone()))
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2), None

        with _attention(self.model, attend):
            self.model.model(self.ids(before + sample.context), use_cache=False)
        queries, keys, values = (torch.stack(part) for part in zip(*seen, strict=True))
        return Prefill(sample, self.ids(sample.question + between + sample.answer_prefix), queries, keys, values)

    def answer(self, prefill: Prefill, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> list[float]:
        """Return the score of greedy answers from S caches `(S, L, H, T, D)` with the tokens `kept` `(S, L, H, T)`."""
        reader = _Reader(keys, values, kept, self.scale)
        ids, position = prefill.question.expand(len(kept), -1), keys.shape[3]
        steps: list[torch.Tensor] = []
        with _attention(self.model, reader):
            while len(steps) < prefill.sample.max_new_tokens:
                positions = torch.arange(position, position + ids.shape[1])[None].expand(len(kept), -1)
                states = self.model.model(ids, position_ids=positions, use_cache=False).last_hidden_state
                position += ids.shape[1]
                steps.append(self.model.lm_head(states[:, -1]).argmax(-1))
                ids = steps[-1][:, None]
                if (torch.stack(steps) == self.tokenizer.eos_token_id).any(0).all():
                    break
        return [self._score(prefill.sample, row) for row in torch.stack(steps, dim=1).tolist()]

    def _score(self, sample: EvalSample, ids: list[int]) -> float:
        end = ids.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in ids else len(ids)
        return next(iter(reference.score(sample, self.tokenizer.decode(ids[:end], skip_special_tokens=True)).values()))


class _Reader:
    """Attention to stored caches and to what came after, one row per cache."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, scale: float) -> None:
        # Scaled and transposed once: `(S, H, D, T)` per layer, and 0 or -inf `(S, H, 1, T)`.
        self.keys = [(scale * layer).transpose(-1, -2).contiguous() for layer in keys.unbind(1)]
        self.values, self.scale = values.unbind(1), scale
        self.hidden = [torch.where(layer, 0.0, -torch.inf).unsqueeze(2) for layer in kept.unbind(1)]
        self.later: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, module: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> Any:
        layer, new, heads = module.layer_idx, key.shape[2], key.shape[1]
        if layer in self.later:
            before = self.later[layer]
            key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
        self.later[layer] = key, value
        grouped = query.unflatten(1, (heads, -1)).flatten(2, 3)
        stored = grouped @ self.keys[layer] + self.hidden[layer]
        later = self.scale * grouped @ key.transpose(-1, -2)
        unseen = torch.ones(new, key.shape[2], dtype=torch.bool).triu(key.shape[2] - new + 1)
        later = later.unflatten(2, (-1, new)).masked_fill(unseen, -torch.inf).flatten(2, 3)
        shares = torch.cat([stored, later], dim=-1).softmax(-1).split([stored.shape[-1], later.shape[-1]], dim=-1)
        out = shares[0] @ self.values[layer] + shares[1] @ value
        return out.unflatten(2, (-1, new)).flatten(1, 2).transpose(1, 2), None


@contextmanager
def _attention(model: Any, function: Callable[..., Any]) -> Iterator[None]:
    AttentionInterface.register(_ATTENTION, function)
    AttentionMaskInterface.register(_ATTENTION, lambda *rest, **more: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def through_pages(tokens: torch.Tensor, widths: torch.Tensor, *, keys: bool) -> torch.Tensor:
    """Return `(N, T, D)` as pages of the packed format give them back, tokens of one width in order of position.

    Parameters
    ----------
    tokens : torch.Tensor
        `(N, T, D)` float32, of N lanes.
    widths : torch.Tensor
        `(N, T)` int8; widths 0 and 16 leave tokens as they are.
    keys : bool
        Keys or values.
    """
    flat = tokens.flatten(0, 1)
    out = flat.clone()
    for width, kind in KINDS.items():
        pages = _page_table(widths == width)
        if len(pages):
            filled = pages.cummax(1).values
            opened = decode_pages(encode_pages(flat[filled][None], kind, keys=keys), torch.float32)[0]
            out[pages[pages >= 0]] = opened[pages >= 0]
    return out.view_as(tokens)


def _page_table(chosen: torch.Tensor) -> torch.Tensor:
    """Return the tokens of each page `(pages, PAGE)`, ascending indices into `(N * T,)`; -1 where there is none."""
    rank = chosen.cumsum(1) - 1
    counts = (chosen.sum(1) + PAGE - 1) // PAGE
    first = counts.cumsum(0) - counts
    table = torch.full((int(counts.sum()), PAGE), -1)
    page = first[:, None] + rank // PAGE
    table[page[chosen], rank[chosen] % PAGE] = chosen.flatten().nonzero().squeeze(1)
    return table


def stored(prefill: Prefill, widths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values `(S, L, H, T, D)` as caches of widths `(S, L, H, T)` give them back."""
    lanes = widths.flatten(0, 2)
    shape = (*widths.shape, prefill.keys.shape[-1])
    keys, values = (part.expand(shape).flatten(0, 2) for part in (prefill.keys, prefill.values))
    return through_pages(keys, lanes, keys=True).view(shape), through_pages(values, lanes, keys=False).view(shape)
