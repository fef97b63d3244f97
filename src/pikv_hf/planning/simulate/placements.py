"""Where simulated devices keep tokens: placements by name, and the re-planning of the balanced one.

Everything here is counted in tokens of one sequence. A stock is `(layers, experts, devices)` int64: how many tokens of
an expert a device holds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pikv_hf.common.suggest import did_you_mean
from pikv_hf.sharding.load_balancing import balanced_replicas, bin_loads, imbalance
from pikv_hf.sharding.shard_map import ShardMap

Integers = npt.NDArray[np.int64]


class Placed:
    """A static placement: tokens go where a formula says and stay there.

    Parameters
    ----------
    layers, experts, devices, page_size : int
        Sizes.
    bound : float
        The skew that is tolerated: the fullest device over the mean, less one.
    rows : int
        Sequences with the same tokens; one is counted, the others only where a placement waits for enough tokens.

    Attributes
    ----------
    stock : numpy.ndarray
        What each device holds, see the module.
    replans, moved_pages : int
        How often a layer was re-planned, and the pages that moved between devices for it.
    """

    def __init__(
        self, layers: int, experts: int, devices: int, page_size: int, *, bound: float = 0.1, rows: int = 1
    ) -> None:
        self.experts, self.devices, self.page_size = experts, devices, page_size
        self.bound, self.rows = bound, rows
        self.stock: Integers = np.zeros((layers, experts, devices), np.int64)
        self.replans = self.moved_pages = 0

    def add(self, positions: Integers, experts: Integers) -> None:
        """Store tokens `(n,)` with their experts `(layers, n)`."""
        for layer, chosen in enumerate(experts):
            places = self.place(layer, positions, chosen)
            counts = np.bincount(chosen * self.devices + places, minlength=self.experts * self.devices)
            self.stock[layer] += counts.reshape(self.experts, self.devices)

    def place(self, layer: int, positions: Integers, experts: Integers) -> Integers:
        """Return the device of each token, `(n,)`."""
        raise NotImplementedError

    def settle(self) -> None:
        """Move pages if that is needed; a static placement never does."""


class ExpertPlaced(Placed):
    """Neighbouring experts together, as :func:`pikv_hf.sharding.placement.expert_placement`."""

    def place(self, layer: int, positions: Integers, experts: Integers) -> Integers:
        """Return the device of each token, `(n,)`."""
        return experts * min(self.devices, self.experts) // self.experts


class HashPlaced(Placed):
    """Page by page in turn, as :func:`pikv_hf.sharding.placement.hash_placement`."""

    def place(self, layer: int, positions: Integers, experts: Integers) -> Integers:
        """Return the device of each token, `(n,)`."""
        return positions // self.page_size % self.devices


class OriginalPlaced(Placed):
    """The PiKV paper's formula (arXiv 2508.06526, section 3.1) over all devices, see :func:`original_shards`."""

    def place(self, layer: int, positions: Integers, experts: Integers) -> Integers:
        """Return the device of each token, `(n,)`."""
        return original_shards(positions, experts, self.devices)


class BalancedPlaced(Placed):
    """Experts and replicas of hot ones on devices of about equal load, re-planned when the skew passes a bound.

    Until something is measured, experts count as equally loaded. A layer whose fullest device holds more than
    `(1 + bound)` times the mean and a page is re-planned: new tokens follow the loads measured so far, and full pages
    move from devices above the mean to those below, from the donor's largest expert first.
    """

    def __init__(self, layers: int, experts: int, devices: int, page_size: int, **options: Any) -> None:
        super().__init__(layers, experts, devices, page_size, **options)
        self._routes = [routes(np.ones(experts), devices, self.bound)] * layers

    def place(self, layer: int, positions: Integers, experts: Integers) -> Integers:
        """Return the device of each token, `(n,)`."""
        first, count, device = self._routes[layer]
        return device[first[experts] + positions // self.page_size % count[experts]]

    def settle(self) -> None:
        """Re-plan the layers whose skew passes the bound."""
        loads = self.stock.sum(axis=1)
        limits = (1 + self.bound) * loads.mean(axis=1) + self.page_size
        for layer in np.flatnonzero(loads.max(axis=1) > limits):
            self._routes[layer] = routes(self.stock[layer].sum(axis=1), self.devices, self.bound)
            self.moved_pages += level(self.stock[layer], self.page_size)
            self.replans += 1


class DividedPlaced(Placed):
    """What a :class:`~pikv_hf.PiKVCache` does over several parts: see :class:`~pikv_hf.sharding.shard_map.ShardMap`.

    Every expert is a shard. Neighbouring shards stay together, those at the edges of parts are divided page by page,
    and all are divided anew when parts are filled unevenly. No page moves; tokens to come make up for it.
    """

    def __init__(self, layers: int, experts: int, devices: int, page_size: int, **options: Any) -> None:
        super().__init__(layers, experts, devices, page_size, **options)
        self._maps = [ShardMap(experts, [1.0] * devices, page_size, whole=False) for _ in range(layers)]

    def place(self, layer: int, positions: Integers, experts: Integers) -> Integers:
        """Return the device of each token, `(n,)`."""
        # No token is of part -1, so that each has a code that tells its part.
        coded = self._maps[layer].own(experts, positions, -1)
        self._maps[layer].note(np.tile(coded, self.rows), -1)
        return (-1 - coded) // self.experts

    def settle(self) -> None:
        """Divide shards anew where parts are filled unevenly."""
        self.replans += sum(shards.divide_if_skewed() for shards in self._maps)


def original_shards(positions: Integers, experts: Integers, devices: int, token_groups: int | None = None) -> Integers:
    """Return the paper's shard of each token, `(t mod N_tok) xor (e mod N_exp)`, folded onto the devices.

    Parameters
    ----------
    positions, experts : numpy.ndarray
        `(n,)`.
    devices : int
        G. The paper gives neither `N_tok` nor `N_exp`, nor says what happens to numbers beyond the last device; here
        `N_exp` is G, and they are taken modulo G. For a power of two there are none.
    token_groups : int, optional
        `N_tok`, by default G.
    """
    return ((positions % (token_groups or devices)) ^ (experts % devices)) % devices


def routes(loads: npt.ArrayLike, devices: int, bound: float) -> tuple[Integers, Integers, Integers]:
    """Plan where tokens of each expert go, with as few replicas as keep the expected skew within the bound.

    Parameters
    ----------
    loads : array_like
        `(E,)`, measured or expected tokens.
    devices : int
        G.
    bound : float
        Tolerated skew; where even 4 G replicas do not reach it, the last plan counts.

    Returns
    -------
    tuple of numpy.ndarray
        `(E,)` first place and `(E,)` number of places of each expert, and the device of each place.
    """
    weights = np.asarray(loads, np.float64)
    fewest = max(0, devices - len(weights))
    for replicas in (fewest, *(fewest + share * devices // 4 for share in (1, 2, 4, 8, 16))):
        items, device = balanced_replicas(weights, devices, replicas)
        places = np.bincount(items)
        if imbalance(bin_loads((weights / places)[items], device, devices)) <= 1 + bound:
            break
    return np.cumsum(places) - places, places, device[np.argsort(items, kind="stable")]


def level(stock: Integers, page_size: int) -> int:
    """Move full pages from devices above the mean to those below, in place, and return their number.

    Parameters
    ----------
    stock : numpy.ndarray
        `(E, G)` int64 tokens of one layer. Afterwards no device holds a page more than the mean, unless it has no full
        pages of one expert left to give.
    page_size : int
        Tokens per page.
    """
    loads = stock.sum(axis=0)
    above = loads * len(loads) - loads.sum()
    unit = page_size * len(loads)
    # Whole pages: what donors can spare without falling below the mean, and receivers can take in passing it once.
    spare, room = np.maximum(above, 0) // unit, -(-np.maximum(-above, 0) // unit)
    receivers = _heaviest(room)
    moved = 0
    for donor in _heaviest(spare):
        for expert in _heaviest(stock[:, donor] // page_size):
            left = min(int(spare[donor]), int(stock[expert, donor]) // page_size)
            while left and receivers:
                pages = min(left, int(room[receivers[0]]))
                stock[expert, donor] -= pages * page_size
                stock[expert, receivers[0]] += pages * page_size
                spare[donor], room[receivers[0]] = spare[donor] - pages, room[receivers[0]] - pages
                left, moved = left - pages, moved + pages
                if not room[receivers[0]]:
                    receivers.pop(0)
    return moved


def _heaviest(amounts: Integers) -> list[int]:
    """Return the indices of positive amounts, the largest first, of equals the lowest index."""
    order = np.argsort(-amounts, kind="stable")
    found: list[int] = order[amounts[order] > 0].tolist()
    return found


#: Placements by name.
PLACEMENTS: dict[str, Callable[..., Placed]] = {
    "expert": ExpertPlaced,
    "divided": DividedPlaced,
    "balanced": BalancedPlaced,
    "hash": HashPlaced,
    "original": OriginalPlaced,
}


def make_placed(name: str, layers: int, experts: int, devices: int, page_size: int, **options: Any) -> Placed:
    """Return an empty store of a placement; sizes and options are those of :class:`Placed`.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if name not in PLACEMENTS:
        raise ValueError(f"unknown placement {name!r}{did_you_mean(name, PLACEMENTS)} (known: {', '.join(PLACEMENTS)})")
    return PLACEMENTS[name](layers, experts, devices, page_size, **options)


def top_share(stock: npt.NDArray[Any]) -> float:
    """Return the share of tokens that are on the device which holds most of their expert, `stock` `(..., E, G)`."""
    return float(stock.max(axis=-1).sum() / max(1, stock.sum()))


def devices_per_expert(stock: npt.NDArray[Any]) -> float:
    """Return how many devices hold tokens of an expert, mean over tokens, `stock` `(..., E, G)`."""
    held = stock.sum(axis=-1)
    return float(((stock > 0).sum(axis=-1) * held).sum() / max(1, held.sum()))


def shared_bits(stock: npt.NDArray[Any]) -> float:
    """Return the mutual information of expert and device in bits, `stock` `(E, G)` of one layer; 0 if it is empty."""
    joint = stock / max(1, stock.sum())
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / apart[there])).sum())
