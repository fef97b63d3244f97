"""Latents, rotary keys and queries at DeepSeek-V3's geometry, with what is hard for codecs: unlike channels, outliers.

No weights of such a model are at hand. Latents are made as its layers make them: hidden states whose channels go
together and whose tokens resemble those before them, RMS-normed, times a weight per channel.
"""

import dataclasses
from collections.abc import Callable

import torch

#: DeepSeek-V3's latent attention (arXiv 2412.19437), with a quarter of its 128 heads.
HEADS, LATENT, ROTARY, NOPE, VALUE = 32, 512, 64, 128, 128

#: Queries at the last positions, each of which sees the tokens up to its own.
QUERIES = 32


@dataclasses.dataclass(frozen=True, slots=True)
class LatentInput:
    """One layer of latent attention on one prompt.

    Attributes
    ----------
    latents, rotary : torch.Tensor
        `(T, R)` and `(T, Dr)` float32.
    query : torch.Tensor
        `(Hq, Q, R + Dr)`, absorbed and scaled.
    values : torch.Tensor
        `(Hq, Dv, R)`, what makes values of latents.
    """

    latents: torch.Tensor
    rotary: torch.Tensor
    query: torch.Tensor
    values: torch.Tensor

    def output(self, latents: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """Return what attention makes of these tokens, `(Hq, Q, Dv)`."""
        tokens, queries = len(latents), self.query.shape[1]
        hidden = torch.ones(queries, tokens, dtype=torch.bool).triu_(tokens - queries + 1)
        logits = self.query @ torch.cat([latents, rotary], dim=-1).T
        return logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1) @ latents @ self.values.transpose(1, 2)


def _weights(channels: int) -> torch.Tensor:
    return torch.randn(channels).mul_(0.5).exp_()


def _correlated(tokens: int, channels: int) -> torch.Tensor:
    """Return `(T, C)` with a few strong directions, each token 0.7 of the one before it, about a mean of its own."""
    strength = torch.arange(1, channels + 1).float() ** -0.5
    mixing = torch.linalg.qr(torch.randn(channels, channels)).Q * strength[:, None]
    steps = torch.randn(tokens, channels)
    for token in range(1, tokens):
        steps[token] = 0.7 * steps[token - 1] + (1 - 0.7**2) ** 0.5 * steps[token]
    mixed = steps @ mixing
    return mixed + 0.5 * mixed.std() * torch.randn(channels)


def _rotated(keys: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return keys `(..., T, Dr)` turned by their positions, as rotary embeddings do."""
    half = keys.shape[-1] // 2
    angles = torch.arange(first, first + keys.shape[-2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    even, odd = keys[..., :half], keys[..., half:]
    return torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1)


def _unchanged(latents: torch.Tensor, base: torch.Tensor) -> None:
    """Leave everything as it is."""


def _one_channel(factor: float) -> Callable[[torch.Tensor, torch.Tensor], None]:
    def change(latents: torch.Tensor, base: torch.Tensor) -> None:
        middle = latents.square().mean(dim=0).sqrt().median()
        latents[:, 7] *= factor * middle / latents[:, 7].square().mean().sqrt()

    return change


def _spikes(latents: torch.Tensor, base: torch.Tensor) -> None:
    latents[::64, 7] *= 50


def _rotary_pair(latents: torch.Tensor, base: torch.Tensor) -> None:
    # A pair that turns slowly, as that of DeepSeek's outliers does.
    base[:, [20, 20 + ROTARY // 2]] *= 20


#: What is done to latents, and to rotary keys before they are turned.
CASES: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "ordinary": _unchanged,
    "one channel x20": _one_channel(20),
    "one channel x50": _one_channel(50),
    "spikes x50 in one channel": _spikes,
    "one rotary pair x20": _rotary_pair,
}


def latent_input(case: str, seed: int, tokens: int = 2048, heads: int = HEADS) -> LatentInput:
    """Return a layer of a case. Heads look at content and at positions, each as sharply as chance has it."""
    torch.manual_seed(seed)
    hidden = _correlated(tokens, LATENT)
    latents = hidden * hidden.square().mean(dim=1, keepdim=True).rsqrt() * _weights(LATENT)
    base = _correlated(tokens, ROTARY)
    CASES[case](latents, base)
    latents, rotary = latents.bfloat16().float(), _rotated(base).bfloat16().float()
    up = torch.randn(heads, NOPE, LATENT) * LATENT**-0.5
    values = torch.randn(heads, VALUE, LATENT) * LATENT**-0.5
    # Queries look for keys that were there, and for what is new.
    wanted = latents[torch.randint(0, tokens, (heads, QUERIES))] @ up.transpose(1, 2)
    content = (wanted + wanted.std() * torch.randn_like(wanted)) @ up
    turned = _rotated(base.mean(dim=0) + base.std() * torch.randn(heads, QUERIES, ROTARY), tokens - QUERIES)
    sharpness = torch.rand(2, heads, 1, 1) * 2.5 + 0.5
    parts = [
        query * (wanted_std / (query @ keys.T).std(dim=(1, 2), keepdim=True))
        for query, keys, wanted_std in zip((content, turned), (latents, rotary), sharpness, strict=True)
    ]
    return LatentInput(latents, rotary, torch.cat(parts, dim=-1), values)
