"""The placement that a layer of a cache has by its options: by experts, in groups of equal load, or by position."""

from collections.abc import Callable

import numpy as np
import torch

from ..config import PiKVConfig
from ..sharding.placement import balanced_placement, expert_placement, hash_placement, where_known


def layer_placement(
    config: PiKVConfig, layer_idx: int, num_experts: int, loads: np.ndarray | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the function from positions and experts of tokens, `(n,)` integers, to their shards.

    Parameters
    ----------
    config : PiKVConfig
        Of the cache.
    layer_idx : int
        The model layer, for error messages.
    num_experts : int
        What the layer's expert router chooses among, 0 where tokens are placed by position.
    loads : numpy.ndarray, optional
        `(E,)`, the tokens of each expert so far; None while nothing is known.
    """
    by_position = hash_placement(config.page_size, config.num_shards)
    if not num_experts:
        return by_position
    if config.placement != "balanced":
        by_expert = expert_placement(num_experts, config.num_shards, layer_idx)
    else:
        known = np.ones(num_experts) if loads is None else loads
        by_expert = balanced_placement(known, config.num_shards, config.page_size, layer_idx, config.hot_replicas)
    return where_known(by_expert, by_position)
