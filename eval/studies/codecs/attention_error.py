"""The measure of all comparisons: how far attention over decoded pages is from attention over the tokens themselves.

As in the cache, the first page (sinks) and at least the last WINDOW tokens stay exact, and whole pages of PAGE tokens
between them are coded. Queries are the last of the prompt, each seeing the tokens up to its own.
"""

import dataclasses
import math

import torch

from .sample_kv import AttentionInput

#: Tokens per page, and newest tokens that stay exact.
PAGE, WINDOW = 32, 128

#: What the results say about how they were measured.
METRIC = (
    "error: ||attention output - exact attention output|| / ||exact attention output|| (Frobenius, over the query "
    "heads and last 48 queries of a layer and prompt), root mean square over layers and prompts; pages of 32 tokens; "
    "the first page, the last 128 tokens and what fills no page stay exact"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Subject:
    """An attention layer on one prompt, ready to be measured with other keys or values.

    Attributes
    ----------
    layer : AttentionInput
        The exact queries, keys and values.
    coded : torch.Tensor
        `(N * P,)` int64, the tokens that are coded, page after page.
    weights, output : torch.Tensor
        `(H, G * Q, T)` and `(H, G * Q, Dv)`, exact attention weights and output.
    """

    layer: AttentionInput
    coded: torch.Tensor
    weights: torch.Tensor
    output: torch.Tensor

    @classmethod
    def of(cls, layer: AttentionInput, *, by_expert: bool = False) -> "Subject":
        """Prepare a layer; with `by_expert`, a page holds tokens of one expert, as in the cache's shards."""
        tokens = layer.keys.shape[1]
        coded = _by_expert(layer.experts) if by_expert else torch.arange(PAGE, PAGE + _whole_pages(tokens) * PAGE)
        weights = _weights(layer.query, layer.keys)
        return cls(layer, coded, weights, weights @ layer.values)

    @property
    def key_pages(self) -> torch.Tensor:
        """The keys that are coded, `(H, N, P, D)`."""
        return self.layer.keys[:, self.coded].unflatten(1, (-1, PAGE))

    @property
    def value_pages(self) -> torch.Tensor:
        """The values that are coded, `(H, N, P, Dv)`."""
        return self.layer.values[:, self.coded].unflatten(1, (-1, PAGE))

    def error(self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> float:
        """Return the relative error of the attention output.

        Parameters
        ----------
        keys, values : torch.Tensor, optional
            `(H, N, P, D)` and `(H, N, P, Dv)`, decoded pages; without them the exact ones are taken.
        """
        weights = self.weights
        if keys is not None:
            weights = _weights(self.layer.query, self.layer.keys.index_copy(1, self.coded, keys.flatten(1, 2)))
        changed = self.layer.values
        if values is not None:
            changed = changed.index_copy(1, self.coded, values.flatten(1, 2))
        return ((weights @ changed - self.output).norm() / self.output.norm()).item()


def root_mean_square(errors: list[float]) -> float:
    """Return the root mean square of errors of layers and prompts."""
    return math.sqrt(sum(error * error for error in errors) / len(errors))


def _whole_pages(tokens: int) -> int:
    return max(0, tokens - PAGE - WINDOW) // PAGE


def _by_expert(experts: torch.Tensor) -> torch.Tensor:
    """Return the tokens between sinks and window, expert by expert in order of time, whole pages of each."""
    inside = torch.arange(PAGE, len(experts) - WINDOW)
    runs = [inside[experts[inside] == expert] for expert in experts[inside].unique()]
    return torch.cat([run[: len(run) // PAGE * PAGE] for run in runs])


def _weights(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return causal attention weights of the last queries, `(H, G * Q, T)`."""
    heads, tokens, dim = keys.shape
    queries = query.shape[1]
    folded = query.reshape(heads, -1, dim)
    hidden = torch.ones(queries, tokens, dtype=torch.bool).triu(tokens - queries + 1)
    logits = (folded @ keys.transpose(1, 2)).mul_(dim**-0.5).unflatten(1, (-1, queries))
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1).flatten(1, 2)
