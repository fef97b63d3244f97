"""Placement: which shard a token's K/V lives in."""

from collections.abc import Callable

import torch


def hash_placement(page_size: int, num_shards: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Place tokens by position: `(position // page_size) % num_shards`, so that shards fill evenly.

    Parameters
    ----------
    page_size, num_shards : int
        As in :class:`~pikv_hf.PiKVConfig`.

    Returns
    -------
    callable
        Maps `(positions, experts)`, `(n,)` integers, to `(n,)` shard numbers; experts are ignored.
    """

    def shard_of(positions: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        return positions // page_size % num_shards

    return shard_of


def expert_placement(
    num_experts: int, num_shards: int, layer_idx: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Place tokens by primary expert: neighbouring experts form a shard, `expert * num_shards // num_experts`.

    Parameters
    ----------
    num_experts, num_shards : int
        With fewer experts than shards, every expert has a shard of its own and the rest stay empty.
    layer_idx : int
        The model layer, for error messages.

    Returns
    -------
    callable
        Maps `(positions, experts)`, `(n,)` integers, to `(n,)` shard numbers. It raises `RuntimeError` for tokens whose
        expert is unknown.
    """
    shards = min(num_shards, num_experts)

    def shard_of(positions: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        if bool((experts < 0).any()):
            missing = int((experts < 0).sum())
            raise RuntimeError(
                f"layer {layer_idx}: the model's router chose no expert for {missing} of {experts.numel()} tokens. "
                "Was the cache used with another model than the one it was made for, or the model detached? "
                'placement="hash" needs no router.'
            )
        return experts.long() * shards // num_experts

    return shard_of
