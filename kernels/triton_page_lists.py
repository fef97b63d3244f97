"""Lists of pages on a GPU: the launches of each call, and what they need beside a query."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import triton.language as tl

from .dispatch import launching_on
from .page_codes import Kind, PageCodes
from .page_lists import ListedPool, PageLists
from .triton_list_upload import SortedLists, uploaded
from .triton_listed_kernel import KIND_DIGITS, MOST_FORMATS, listed_kernel
from .triton_merge_partials import merge_partials
from .triton_paged_decode_attention import MIN_PAGES, launch_parameters, processors, sizes, split_count, takes_ptx
from .triton_pool import block_tokens

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclasses.dataclass(frozen=True, slots=True)
class _Launch:
    """A launch that computes `parts` parts of lists, from `first_part` on, and what it is compiled for."""

    programs: int
    first_part: int
    parts: int
    constants: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Prepared:
    """What calls with a `group` of query heads per KV head, in a `dtype`, need as long as the lists last.

    `grown_from` has the tokens that the growing pages of each pool had when the lists were uploaded.
    """

    group: int
    dtype: torch.dtype
    listed: torch.Tensor
    launches: list[_Launch]
    parts: int
    grown_from: list[tuple[ListedPool, np.ndarray]]

    def growth(self) -> int | None:
        """Return how many tokens each growing page has got since; None if they have not got the same."""
        grown = {0} if not self.grown_from else set()
        for pool, before in self.grown_from:
            change = pool.counts[pool.growing] - before
            grown |= {int(change.min()), int(change.max())}
        return grown.pop() if len(grown) == 1 else None


class ListReader:
    """Reads lists on a GPU. See :class:`.page_lists.PageLists`."""

    def __init__(self, lists: PageLists) -> None:
        self._sorted = SortedLists.of(lists)
        self._prepared: _Prepared | None = None

    def attend(
        self,
        lists: PageLists,
        query: torch.Tensor,
        scale: float,
        softcap: float | None,
        page_lse: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend as :meth:`.PageLists.attend` does."""
        assert page_lse is None or len(lists.pools) == 1, "an entry's column is its place among those of its pool"
        shape = query.shape[:-1]
        if not query.numel():
            return query.new_zeros((*shape, lists.value_dim), dtype=torch.float32), query.new_zeros(shape).float()
        group = query.numel() // (lists.rows * lists.heads * lists.query_dim)
        known, grown = self._prepared, None
        if known is not None and (known.group, known.dtype) == (group, query.dtype):
            grown = known.growth()
        if known is None or grown is None:
            known, grown = self._prepare(lists, group, query), 0
            self._prepared = known
        out = query.new_empty((known.parts, lists.rows, lists.heads * group, lists.value_dim), dtype=torch.float32)
        lse = out.new_empty(out.shape[:-1])
        query, columns = query.contiguous(), 0 if page_lse is None else page_lse.shape[-1]
        with launching_on(query.device):
            for launch in known.launches:
                listed_kernel[(launch.programs,)](
                    query, known.listed, out, lse, page_lse,
                    float(scale), 1.0 if softcap is None else float(softcap), grown, lists.rows, len(lists.pools),
                    known.parts, launch.first_part, launch.parts, columns,
                    **launch.constants, SOFTCAP=softcap is not None, PAGE_LSE=page_lse is not None,
                )  # fmt: skip
            whole = (out[0], lse[0]) if known.parts == 1 else merge_partials(out, lse, None)
        return whole[0].view(*shape, lists.value_dim), whole[1].view(shape)

    def _prepare(self, lists: PageLists, group: int, query: torch.Tensor) -> _Prepared:
        """Upload the lists, and choose how they are cut."""
        pools = self._sorted.pools
        together = _alike(pools)
        chosen = [launch_parameters_of(some, group, query.dtype) for some in together]
        rows = lists.rows * lists.heads
        parts: list[int] = []
        for some, constants in zip(together, chosen, strict=True):
            first = len(parts)
            longest = self._sorted.longest[first : first + len(some)]
            blocks = rows * -(-group // constants["BLOCK_G"])
            programs = constants.pop("programs") * processors(query.device)
            parts += parts_of(some, longest, split_count(blocks, int(longest.sum()), programs))
        listed, aligned = uploaded(self._sorted, parts, [number for some in together for number in _formats(some)[1]])
        launches: list[_Launch] = []
        common = {
            "HEADS": lists.heads, "G": group, "BY_HEAD": lists.by_head, "P": lists.page_size,
            "BLOCK_P": block_tokens(lists.page_size), "ALIGNED": aligned, "ASM": takes_ptx(query),
        }  # fmt: skip
        rest, first_part = parts, 0
        for some, constants in zip(together, chosen, strict=True):
            own, rest = sum(rest[: len(some)]), rest[len(some) :]
            programs = rows * -(-group // constants["BLOCK_G"]) * own
            launches.append(_Launch(programs, first_part, own, common | constants))
            first_part += own
        grown_from = [(pool, pool.counts[pool.growing].copy()) for pool in pools if len(pool.growing)]
        return _Prepared(group, query.dtype, listed, launches, sum(parts), grown_from)


def _alike(pools: Sequence[ListedPool]) -> list[list[ListedPool]]:
    """Divide sorted pools into those that one launch may read: of equal channels, and of not too many formats."""
    together: list[list[ListedPool]] = []
    for pool in pools:
        last = together[-1] if together else []
        alike = bool(last) and sizes(pool.keys, pool.values) == sizes(last[0].keys, last[0].values)
        if alike and len(_formats([*last, pool])[0]) <= MOST_FORMATS:
            last.append(pool)
        else:
            together.append([pool])
    return together


def _formats(pools: Sequence[ListedPool]) -> tuple[list[tuple[Kind, Kind]], list[int]]:
    """Return the formats of some pools, and which of them each pool has."""
    each = [(pool.keys.kind, pool.values.kind) for pool in pools]
    every = list(dict.fromkeys(each))
    return every, [every.index(own) for own in each]


def _digits(kinds: Iterable[Kind]) -> int:
    """Return kinds as the digits of a number, base 8, the first one lowest."""
    return sum(KIND_DIGITS[kind] << (3 * place) for place, kind in enumerate(kinds))


def launch_parameters_of(pools: Sequence[ListedPool], group: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the kernel is compiled for, of a launch's pools, and the `programs` wanted per multiprocessor.

    Raises
    ------
    TypeError
        If what the pools store as it is has several dtypes.
    """
    launches = [launch_parameters(pool.keys, pool.values, group, dtype, {}) for pool in pools]
    stored = {each for pool in pools for part in (pool.keys, pool.values) for each in _stored_as_they_are(part)}
    if len(stored) > 1:
        raise TypeError(f"pages of one list with tokens in several dtypes: {sorted(map(str, stored))}")
    plain, coded = ([x.stages for x, pool in zip(launches, pools, strict=True) if _is_plain(pool) is is_plain]
                    for is_plain in (True, False))  # fmt: skip
    formats = _formats(pools)[0]
    return {
        "FORMATS": len(formats), "BLOCK_G": min(launch.heads for launch in launches),
        "DTYPE": _TYPES[stored.pop()] if stored else tl.float32,
        "PLAIN_STAGES": max(plain, default=1), "CODED_STAGES": max(coded, default=1),
        "num_warps": max(launch.warps for launch in launches), "num_stages": max([*plain, *coded]),
        "programs": min(launch.programs for launch in launches),
        "KEY_KINDS": _digits(kind for kind, _ in formats), "VALUE_KINDS": _digits(kind for _, kind in formats),
        **sizes(pools[0].keys, pools[0].values),
    }  # fmt: skip


def _is_plain(pool: ListedPool) -> bool:
    return pool.keys.kind == pool.values.kind == "none"


def _stored_as_they_are(part: PageCodes) -> list[torch.dtype]:
    parts = [part.codes] if part.kind == "none" else []
    return [each.dtype for each in (*parts, part.latent) if each is not None]


def parts_of(pools: Sequence[ListedPool], longest: np.ndarray, parts: int) -> list[int]:
    """Divide the parts that lists are read in among the pools, by the bytes of their longest lists `(pools,)`."""
    of_pages = [
        sum(each[0, 0].nbytes for part in (pool.keys, pool.values) for each in part.tensors()) for pool in pools
    ]
    weights = np.maximum(1, longest * of_pages)
    shares = np.round(parts * weights / weights.sum()).astype(np.int64)
    return [int(share) for share in np.clip(shares, 1, np.maximum(1, longest // MIN_PAGES))]
