"""Placement: which shard a token's K/V lives in."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from .load_balancing import balanced_replicas


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
        expert is unknown, or is none of these.
    """
    shards = min(num_shards, num_experts)

    def shard_of(positions: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        _check_known(experts, num_experts, layer_idx)
        return experts.long() * shards // num_experts

    return shard_of


def balanced_placement(
    loads: npt.ArrayLike, num_shards: int, page_size: int, layer_idx: int, hot_replicas: int = 0
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Place tokens by primary expert, experts being grouped into shards of about equal load.

    Greedy as EPLB (arXiv 2412.19437): see :mod:`pikv_hf.sharding.load_balancing`. Equal loads give the shards of
    :func:`expert_placement`. The same loads give the same shards in every process.

    Parameters
    ----------
    loads : array_like
        `(E,)`, the tokens measured, or expected, of each expert; all equal while nothing is known.
    num_shards : int
        With fewer experts than shards, every expert has a shard of its own and the rest hold replicas or stay empty.
    page_size : int
        As in :class:`~pikv_hf.PiKVConfig`.
    layer_idx : int
        The model layer, for error messages.
    hot_replicas : int
        Places for experts beyond one each, given to the experts of the highest load per place. An expert's tokens
        alternate between its places by page of positions, `(position // page_size) % places`, so none is stored twice.

    Returns
    -------
    callable
        Maps `(positions, experts)`, `(n,)` integers, to `(n,)` shard numbers. It raises `RuntimeError` for tokens whose
        expert is unknown, or is none of these.

    Raises
    ------
    ValueError
        If loads are no finite, non-negative vector of at least one expert, or a number is too small.
    """
    if page_size < 1:
        raise ValueError(f"page_size has to be at least 1, got {page_size}")
    items, shards = balanced_replicas(loads, num_shards, hot_replicas)
    # Replicas sorted by expert: those of expert e start at first[e].
    order = np.argsort(items, kind="stable")
    places = np.bincount(items)
    first = torch.from_numpy(np.cumsum(places) - places)
    count, shard = torch.from_numpy(places), torch.from_numpy(shards[order])

    def shard_of(positions: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        _check_known(experts, len(places), layer_idx)
        chosen, device = experts.long(), experts.device
        turn = positions.long() // page_size % count.to(device)[chosen]
        return shard.to(device)[first.to(device)[chosen] + turn]

    return shard_of


def where_known(
    by_expert: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    by_position: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Place tokens by expert where that is known, and by position where no router saw them: their expert is negative.

    Such tokens come from outside of the model, as prefixes and other caches' do, or from a model that is detached.
    """

    def shard_of(positions: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        known = experts >= 0
        if bool(known.all()):
            return by_expert(positions, experts)
        chosen = by_expert(positions, experts.clamp_min(0))
        return torch.where(known, chosen, by_position(positions, experts).to(chosen.dtype))

    return shard_of


def _check_known(experts: torch.Tensor, num_experts: int, layer_idx: int) -> None:
    if not len(experts):
        return
    least, most = torch.stack(experts.aminmax()).tolist()
    if most >= num_experts:
        raise RuntimeError(
            f"layer {layer_idx}: the model's router chose expert {most} of a layer that had {num_experts} when the "
            "cache was made; make a new one with PiKVCache.for_model(model)"
        )
    if least < 0:
        missing = int((experts < 0).sum())
        raise RuntimeError(
            f"layer {layer_idx}: the model's router chose no expert for {missing} of {experts.numel()} tokens. "
            'placement="hash" needs no router'
        )
