"""The Triton kernel over lists of pages of several pools, against float64: compiled on a GPU, else interpreted."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from triton_cases import BACKEND, Case, assert_as_exact, naive_attention, random_case

from pikv_hf.kernels import dispatch, paged_decode_attention
from pikv_hf.kernels.page_codes import KINDS, Kind
from pikv_hf.kernels.page_lists import ListedPool, PageLists

pytestmark = pytest.mark.slow

reading = dispatch.load("page_lists", BACKEND)
ALIKE: list[tuple[Kind, Kind]] = [(kind, kind) for kind in KINDS]
MIXED: list[tuple[Kind, Kind]] = [("int4", "int2"), ("int2", "int4"), ("fp8", "int8"), ("none", "int4")]
#: Two pools of one format: of pages that were never packed, and of those that no codec packed.
WIDTHS: list[tuple[Kind, Kind]] = [(kind, kind) for kind in ("int4", "none", "int2", "none", "int8")]


def pool_of(case: Case, growing: Sequence[int] = ()) -> ListedPool:
    counts = case.counts.cpu().numpy().astype(np.int16)
    return ListedPool(case.keys, case.values, counts, np.array(growing, dtype=np.int64))


def lists_of(pools: Sequence[ListedPool], lists: Sequence[Sequence[tuple[int, int]]], rows: int) -> PageLists:
    """Return lists of `(pool, page)`."""
    entries = [pool << 32 | page for each in lists for pool, page in each]
    starts = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return PageLists(pools, np.array(entries, dtype=np.int64), starts, rows, BACKEND)


def naive(cases: Sequence[Case], lists: Sequence[Sequence[tuple[int, int]]], softcap: float | None = None) -> Any:
    """Attend with the first case's queries to a list of `(pool, page)` for each row, in float64."""
    parts = []
    for pool, case in enumerate(cases):
        rows = [[page for number, page in each if number == pool] for each in lists]
        table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int32)
        for line, row in zip(table, rows, strict=True):
            line[: len(row)] = torch.tensor(row, dtype=torch.int32)
        lengths = torch.tensor(list(map(len, rows)), dtype=torch.int32)
        same = dataclasses.replace(case, query=cases[0].query, table=table, lengths=lengths)
        parts.append(naive_attention(same, softcap)[:2])
    total = torch.stack([lse for _, lse in parts]).logsumexp(dim=0)
    weights = [(lse - total).exp().nan_to_num() for _, lse in parts]
    return sum(out * weight.unsqueeze(-1) for (out, _), weight in zip(parts, weights, strict=True)), total


def check(actual: Any, exact: Any, dtype: torch.dtype = torch.float32) -> None:
    """Compare with float64; what a half has of digits is what its own rounding leaves."""
    yardstick = tuple(each.to(dtype).float() for each in exact)
    if dtype == torch.float32:
        assert_as_exact(actual, yardstick, exact)
    for ours, truth in zip(actual, exact, strict=True):
        assert torch.equal(ours.isfinite().cpu(), truth.isfinite())
        finite = truth.isfinite()
        error = (ours.double().cpu() - truth)[finite].abs().max()
        assert error <= 64 * torch.finfo(dtype).eps * (1 + truth[finite].abs().max())


@pytest.fixture(params=[1, 40], ids=["whole lists", "lists in parts"])
def _processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "processors", lambda device: request.param)
    for module in (reading, dispatch.load("paged_decode_attention", BACKEND)):
        monkeypatch.setattr(module, "MIN_PAGES", 2)


@pytest.mark.usefixtures("_processors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_launch_reads_pages_of_all_widths(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows, one of them without pages, and pages of all pools in any order."""
    cases = [random_case(kinds, dtype, lengths=(6, 0, 3), seed=seed) for seed, kinds in enumerate(WIDTHS)]
    long = [(pool, page) for page in (0, 1, 3, 5, 4, 2) for pool in range(5) if (pool, page) != (1, 3)]
    lists = [long, [], [(2, 5), (0, 0), (2, 1)]]
    launches = launched(monkeypatch)
    actual = lists_of([pool_of(case) for case in cases], lists, 3).attend(cases[0].query, cases[0].scale)
    check(actual, naive(cases, lists), dtype)
    assert launches.count("listed_kernel") == 1
    assert len(launches) <= 2


def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which the name of each kernel is added that is launched from now on."""
    names: list[str] = []
    kernel = type(reading.listed_kernel)
    launch = kernel.__getitem__

    def noted(self: Any, grid: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, grid)

    monkeypatch.setattr(kernel, "__getitem__", noted)
    return names


@pytest.mark.usefixtures("_processors")
def test_more_formats_than_a_launch_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_FORMATS", 4)
    cases = [random_case(kinds, lengths=(4,), seed=seed) for seed, kinds in enumerate([*ALIKE, *MIXED])]
    lists = [[(pool, page) for page in (0, 1, 3, 5) for pool in range(len(cases))]]
    # An entry below 0 is none.
    whole = lists_of([pool_of(case) for case in cases], lists, 1)
    entries = np.insert(whole.entries, 7, -1)
    some = PageLists(whole.pools, entries, np.array([0, len(entries)]), 1, BACKEND)
    exact = naive(cases, lists, 3.0)
    for each in (whole, some):
        launches = launched(monkeypatch)
        check(each.attend(cases[0].query, cases[0].scale, 3.0), exact)
        assert launches.count("listed_kernel") == 3


@pytest.mark.parametrize("groups", [1, 3, 8, 21])
def test_each_kv_head_may_have_a_list_of_its_own(groups: int) -> None:
    cases = [random_case(kinds, groups=groups, lengths=(3, 2)) for kinds in WIDTHS[:2]]
    # Head 0 of both rows, then head 1 of both.
    by_head = [[(0, 0), (1, 1)], [(0, 3)], [(1, 5), (0, 4), (0, 0)], [(1, 1), (1, 3)]]
    out, lse = lists_of([pool_of(case) for case in cases], by_head, 2).attend(cases[0].query, cases[0].scale)
    for head in range(2):
        heads = slice(groups * head, groups * head + groups)
        alone = [
            dataclasses.replace(
                case,
                query=case.query[:, heads],
                keys=case.keys.map(lambda tensor, h=head: tensor[h : h + 1]),
                values=case.values.map(lambda tensor, h=head: tensor[h : h + 1]),
            )
            for case in cases
        ]
        check((out[:, heads], lse[:, heads]), naive(alone, by_head[2 * head : 2 * head + 2]))


def test_pages_grow_without_an_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    """All alike; where they do not, their counts are uploaded again."""
    poisoned = random_case(("none", "none"), counts=[3, 8, 1, 8, 8, 8], size=8, lengths=(2, 2))
    tokens = [part.map(lambda tensor: tensor.nan_to_num(0.5)) for part in (poisoned.keys, poisoned.values)]
    case = dataclasses.replace(poisoned, keys=tokens[0], values=tokens[1])
    pool, lists = pool_of(case, growing=[0, 2]), [[(0, 1), (0, 0)], [(0, 2), (0, 3)]]
    held = lists_of([pool], lists, 2)
    uploads = []
    real = reading.uploaded
    monkeypatch.setattr(reading, "uploaded", lambda *arguments: uploads.append(1) or real(*arguments))
    for first, second, uploaded in ((3, 1, 1), (4, 2, 1), (2, 0, 1), (7, 5, 1), (7, 6, 2), (8, 7, 2), (0, 0, 3)):
        pool.counts[[0, 2]] = first, second
        counts = case.counts.clone()
        counts[0], counts[2] = first, second
        check(held.attend(case.query, case.scale), naive([dataclasses.replace(case, counts=counts)], lists))
        assert len(uploads) == uploaded


@pytest.mark.parametrize("kinds", [("int4", "int4"), ("none", "fp8")], ids="-".join)
def test_latent_channels_and_the_masses_of_pages(kinds: tuple[Kind, Kind]) -> None:
    case = random_case(kinds, torch.float16, latents=(5, 3), lengths=(2, 3))
    pages = [case.table[row, :length].tolist() for row, length in enumerate(case.lengths.tolist())]
    held = lists_of([pool_of(case)], [[(0, page) for page in row] for row in pages], 2)
    page_lse = case.query.new_full((*case.query.shape[:2], case.table.shape[1]), -torch.inf, dtype=torch.float32)
    actual = held.attend(case.query, case.scale, None, page_lse)
    exact = naive_attention(case)
    yardstick = paged_decode_attention(*case.arguments(), page_lse=True, backend="torch")
    assert_as_exact((*actual, page_lse), yardstick, exact)


def test_pools_of_other_channels_take_launches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of their channels may be stored as they are."""
    cases = [random_case(("int4", "none")), random_case(("int4", "int8"), dims=(16, 32), latents=(16, 0), seed=1)]
    lists = [[(0, 1), (1, 0)], [(1, 3)], [(0, 0)]]
    launches = launched(monkeypatch)
    check(lists_of([pool_of(c) for c in cases], lists, 3).attend(cases[0].query, cases[0].scale), naive(cases, lists))
    assert launches.count("listed_kernel") == 2


def test_no_rows() -> None:
    case = random_case(lengths=())
    out, lse = lists_of([pool_of(case)], [], 0).attend(case.query, case.scale)
    assert (out.shape, lse.shape) == ((0, 8, 32), (0, 8))


def test_tokens_in_two_dtypes_are_refused() -> None:
    cases = [random_case(("none", "none")), random_case(("none", "int4"), torch.float16)]
    lists = lists_of([pool_of(case) for case in cases], [[(0, 0), (1, 0)], [], []], 3)
    with pytest.raises(TypeError, match=r"several dtypes: \['torch.float16', 'torch.float32'\]"):
        lists.attend(cases[0].query, 1.0)
