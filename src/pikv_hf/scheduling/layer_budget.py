"""What a layer may hold of a cache's budget."""

import dataclasses

from ..common.budget import Budget
from ..config import PiKVConfig


@dataclasses.dataclass(frozen=True, slots=True)
class LayerBudget:
    """The limits of one paged layer.

    Attributes
    ----------
    tokens : int or None
        Of each sequence, or of each shard of it.
    share : float or None
        Of the tokens that a sequence has seen.
    total_bytes : int or None
        Of everything that the layer keeps alive, with its part of the bounded sliding layers.
    per_shard : bool
        Whether tokens, a share or bytes are those of a shard.
    least : int
        Tokens of a sequence that are never evicted, and room for what comes next: sinks, window, two pages.
    shards : int
        Shards of the layer, at most.
    sliding_tokens : float
        Tokens of each sequence that bounded layers hold, this layer's part of them.
    asked_for : str, int or float
        The budget as the user wrote it.
    divided_by : int
        Layers, and their parts, among which bytes were divided.
    part_share : float
        What one device or process of several may hold of the tokens outside of the window. Bytes are its own, an equal
        share: each has a window too.
    """

    tokens: int | None
    share: float | None
    total_bytes: int | None
    per_shard: bool
    least: int
    shards: int
    sliding_tokens: float
    asked_for: str | int | float
    divided_by: int = 1
    part_share: float = 1.0

    @classmethod
    def of(
        cls, config: PiKVConfig, layers: int, sliding_tokens: int = 0, parts: int = 1, part_share: float = 1.0
    ) -> "LayerBudget | None":
        """Divide a cache's budget by its paged layers; None if it has none.

        Parameters
        ----------
        config : PiKVConfig
            Budget, scope, pages and window.
        layers : int
            Paged layers of the cache.
        sliding_tokens : int
            Tokens per sequence that all bounded sliding layers together hold at most.
        parts : int
            Devices or processes of each layer.
        part_share : float
            Of the tokens outside of the window, for one of them.

        Raises
        ------
        ValueError
            If a budget in tokens is less than what is never evicted, naming both.
        """
        if config.budget is None:
            return None
        budget = Budget.parse(config.budget)
        scope = config.budget_scope or ("cache" if budget.unit == "bytes" else "layer")
        size = config.page_size
        least = -(-config.sink_tokens // size) * size + config.recent_window + 2 * size * parts
        amount = budget.amount / layers if scope == "cache" else budget.amount
        unlimited = cls(
            tokens=None,
            share=None,
            total_bytes=None,
            per_shard=scope == "shard",
            least=least,
            shards=config.num_shards,
            sliding_tokens=0.0,
            asked_for=config.budget,
            part_share=part_share,
        )
        if budget.unit == "share":
            return dataclasses.replace(unlimited, share=budget.amount)
        if budget.unit == "bytes":
            sliding = sliding_tokens / layers if scope == "cache" else 0.0
            # A layer's shards have as much each; its window is beside them.
            of_part = amount if scope == "shard" else amount / parts
            divided_by = (layers if scope == "cache" else 1) * parts
            return dataclasses.replace(
                unlimited, total_bytes=int(of_part), sliding_tokens=sliding, divided_by=divided_by
            )
        smallest = size if scope == "shard" else least
        if amount < smallest:
            named = f"{int(budget.amount)} tokens" + (f" over {layers} layers" if scope == "cache" else f" per {scope}")
            raise ValueError(
                f"a budget of {named} leaves {int(amount)} tokens, but at least {smallest} are needed"
                + ("" if scope == "shard" else f": {_never_evicted(config)}")
            )
        return dataclasses.replace(unlimited, tokens=int(amount))

    def tokens_of(self, seen: int, shards: int) -> int | None:
        """Return the most tokens of a sequence, or of each of its shards, after `seen` positions; None if unlimited."""
        if self.share is None:
            return self.tokens
        allowed = int(self.share * seen)
        return allowed // shards if self.per_shard else max(allowed, self.least)


def _never_evicted(config: PiKVConfig) -> str:
    return (
        f"sinks (sink_tokens={config.sink_tokens}), a window (recent_window={config.recent_window}) and two pages "
        f"(page_size={config.page_size}); less of these need less"
    )
