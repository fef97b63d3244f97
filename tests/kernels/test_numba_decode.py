"""The kernel of the decode step that numba compiles for CPUs, against float64."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import Case, assert_as_exact, check, naive_attention, random_case

from pikv_hf.kernels import dispatch, paged_decode_attention
from pikv_hf.kernels.page_codes import KINDS, Kind
from pikv_hf.kernels.page_lists import ListedPool, PageLists, is_listable

pytest.importorskip("numba", reason="the extra [cpu] is not installed")
numba_decode_kernel = pytest.importorskip("pikv_hf.kernels.numba_decode_kernel")
numba_compiler = pytest.importorskip("pikv_hf.kernels.numba_compiler")

CPU = torch.device("cpu")
ALIKE: list[tuple[Kind, Kind]] = [(kind, kind) for kind in KINDS]
MIXED: list[tuple[Kind, Kind]] = [("int4", "int2"), ("int2", "int4"), ("fp8", "int8"), ("none", "int4")]


def lists_of(case: Case) -> PageLists:
    """Return the lists of a case's rows."""
    pool = ListedPool(case.keys, case.values, case.counts.numpy().astype(np.int16))
    rows = [case.table[row, :length].numpy() for row, length in enumerate(case.lengths.tolist())]
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return PageLists([pool], np.concatenate(rows).astype(np.int64), starts, len(rows), "numba")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kinds", [*ALIKE, *MIXED], ids="-".join)
def test_kinds(kinds: tuple[Kind, Kind], dtype: torch.dtype) -> None:
    check(random_case(kinds, dtype, device=CPU), backend="numba")


@pytest.mark.parametrize("dims", [(16, 16), (64, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("groups", [1, 2, 3, 8, 16, 21])
def test_head_dims_and_query_heads(dims: tuple[int, int], groups: int) -> None:
    check(random_case(("int4", "int8"), heads=1, groups=groups, dims=dims, device=CPU), backend="numba")


# int2 and int4 of a page of 5 have their tokens in rows that do not match; pages of 70 are read in blocks.
@pytest.mark.parametrize("size", [1, 5, 8, 32, 33, 64, 70])
@pytest.mark.parametrize("kinds", [("none", "none"), ("int4", "int2"), ("int2", "int8"), ("fp8", "int4")], ids="-".join)
def test_page_sizes(kinds: tuple[Kind, Kind], size: int) -> None:
    check(random_case(kinds, heads=1, size=size, lengths=(3, 6), device=CPU), backend="numba")


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    counts=st.lists(st.integers(0, 40), min_size=4, max_size=6),
    groups=st.integers(1, 20),
    kinds=st.sampled_from([*ALIKE, *MIXED]),
    seed=st.integers(0, 9),
)
def test_rows_of_any_length(
    lengths: list[int], counts: list[int], groups: int, kinds: tuple[Kind, Kind], seed: int
) -> None:
    case = random_case(
        kinds, heads=2, groups=groups, size=40, lengths=lengths, counts=counts, seed=seed, dims=(16, 48), device=CPU
    )
    check(case, backend="numba")


def test_no_rows_and_no_pages() -> None:
    case = random_case(lengths=(), device=CPU)
    out, lse = paged_decode_attention(*case.arguments(), backend="numba")
    assert (out.shape, lse.shape) == ((0, 8, 32), (0, 8))
    case = random_case(lengths=(0, 0), counts=[], device=CPU)
    out, lse, page_lse = paged_decode_attention(*case.arguments(), page_lse=True, backend="numba")
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert (page_lse == -torch.inf).all()


@pytest.mark.parametrize("kinds", [("int4", "int4"), ("none", "fp8")], ids="-".join)
def test_latent_channels(kinds: tuple[Kind, Kind]) -> None:
    check(random_case(kinds, torch.float16, groups=4, latents=(16, 32), lengths=(2, 3), device=CPU), backend="numba")


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_large_and_small_keys(kind: Kind, factor: float) -> None:
    check(random_case((kind, "none"), torch.float16, factor=factor, device=CPU), backend="numba")


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float) -> None:
    case = random_case(("int8", "int4"), lengths=(2, 1), device=CPU)
    check(case, softcap, backend="numba")
    check(dataclasses.replace(case, query=case.query * 1000), softcap, backend="numba")


def test_a_list_may_be_of_several_pools() -> None:
    """One call reads all of them, pages of several formats in any order."""
    cases = [random_case(kinds, lengths=(4,), seed=seed, device=CPU) for seed, kinds in enumerate([*ALIKE, *MIXED])]
    pools = [ListedPool(case.keys, case.values, case.counts.numpy().astype(np.int16)) for case in cases]
    entries = np.array([number << 32 | page for page in (0, 1, 3, 5) for number in range(len(pools))], dtype=np.int64)
    # An entry below 0 is none.
    entries = np.insert(entries, 7, -1)
    out, lse = PageLists(pools, entries, np.array([0, len(entries)]), 1, "numba").attend(cases[0].query, cases[0].scale)
    table, lengths = torch.tensor([[0, 1, 3, 5]], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    same = [dataclasses.replace(case, query=cases[0].query, table=table, lengths=lengths) for case in cases]
    parts = [naive_attention(case) for case in same]
    total = torch.stack([part[1] for part in parts]).logsumexp(dim=0)
    exact = sum(part[0] * (part[1] - total).exp().unsqueeze(-1) for part in parts)
    assert isinstance(exact, torch.Tensor)
    yardstick = exact.float(), total.float()
    assert_as_exact((out, lse), yardstick, (exact, total))


def test_each_kv_head_may_have_a_list_of_its_own() -> None:
    case = random_case(("int4", "int4"), heads=2, groups=3, lengths=(3, 2), device=CPU)
    pool = ListedPool(case.keys, case.values, case.counts.numpy().astype(np.int16))
    # Head 0 of both rows, then head 1 of both.
    by_head = [np.array(pages, dtype=np.int64) for pages in ([0, 1], [3], [5, 4, 0], [1, 3])]
    starts = np.cumsum([0, *map(len, by_head)], dtype=np.int64)
    lists = PageLists([pool], np.concatenate(by_head), starts, 2, "numba")
    out, lse = lists.attend(case.query, case.scale)
    for number, pages in enumerate(by_head):
        head, row = divmod(number, 2)
        heads = slice(3 * head, 3 * head + 3)
        keys, values = (part.map(lambda tensor, h=head: tensor[h : h + 1]) for part in (case.keys, case.values))
        table = torch.from_numpy(pages)[None].int()
        alone = dataclasses.replace(
            case,
            query=case.query[row : row + 1, heads],
            keys=keys,
            values=values,
            table=table,
            lengths=torch.tensor([len(pages)], dtype=torch.int32),
        )
        exact = naive_attention(alone)[:2]
        yardstick = paged_decode_attention(*alone.arguments(), backend="torch")
        assert_as_exact((out[row : row + 1, heads], lse[row : row + 1, heads]), yardstick, exact)


def test_counts_are_read_in_every_call() -> None:
    case = random_case(("none", "none"), counts=[3, 8, 8, 8, 8, 8], size=8, lengths=(4,), device=CPU)
    lists = lists_of(case)
    for stored in (3, 1, 0):
        lists.pools[0].counts[0] = stored
        counts = case.counts.clone()
        counts[0] = stored
        now = dataclasses.replace(case, counts=counts)
        yardstick = paged_decode_attention(*now.arguments(), backend="torch")
        assert_as_exact(lists.attend(case.query, case.scale), yardstick, naive_attention(now)[:2])


def test_threads_share_a_list_and_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as torch has, and several callers at once, each in memory of its own."""
    case = random_case(("int4", "int4"), lengths=(6,) * 12, device=CPU)
    lists = lists_of(case)
    alone = lists.attend(case.query, case.scale)
    monkeypatch.setattr("pikv_hf.kernels.numba_page_lists.team_size", lambda: 3)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def call() -> None:
        results.extend(lists.attend(case.query, case.scale) for _ in range(50))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 200
    for out, lse in results:
        torch.testing.assert_close(out, alone[0])
        torch.testing.assert_close(lse, alone[1])


def test_what_it_does_not_read_is_left_to_torch() -> None:
    odd = random_case(("none", "none"), dims=(24, 16), device=CPU)
    double = odd.keys.map(lambda tensor: tensor[..., :16].double())
    assert not is_listable(odd.keys, odd.values)
    assert not is_listable(double, odd.values)
    assert is_listable(odd.values)
    check(odd, backend="numba")


def test_it_is_chosen_on_a_cpu_where_it_can_read_the_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.choose(CPU, compiled=True) == "numba"
    assert dispatch.choose(CPU) == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "numba")
    assert dispatch.choose(CPU) == "torch"
    with pytest.raises(ValueError, match="needs tensors on cpu, not on cuda"):
        dispatch.choose(torch.device("cuda"), "numba", compiled=True)
    monkeypatch.setattr(dispatch, "_numba_is_missing", lambda: "which is not installed")
    monkeypatch.delenv(dispatch.VARIABLE)
    assert dispatch.choose(CPU, compiled=True) == "torch"
    with pytest.raises(RuntimeError, match="needs the package numba"):
        dispatch.choose(CPU, "numba", compiled=True)


def test_a_forked_process_computes_alone() -> None:
    """OpenMP's threads are not in it: whoever waited for them would wait for good."""
    program = """
import os, torch
torch.set_num_threads(2)
from triton_cases import random_case
from pikv_hf.kernels import paged_decode_attention
from pikv_hf.kernels.thread_team import team_size
case = random_case(lengths=(6,) * 8, device=torch.device("cpu"))
before = paged_decode_attention(*case.arguments(), backend="numba")
if not (child := os.fork()):
    after = paged_decode_attention(*case.arguments(), backend="numba")
    os._exit(0 if team_size() == 1 and torch.allclose(before[0], after[0]) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-P", "-c", program], env=environment, check=True, timeout=100)


@pytest.mark.slow
def test_what_several_processes_have_kept_on_disk_is_told_apart(tmp_path: Path) -> None:
    """Each compiles for another number of query heads; one that loads both may take neither for the other."""
    program = """
import sys, torch
from triton_cases import check, random_case
for groups in map(int, sys.argv[1:]):
    check(random_case(("none", "none"), groups=groups, device=torch.device("cpu")), backend="numba")
"""
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "NUMBA_CACHE_DIR": str(tmp_path)}
    for groups in (["8"], ["1"], ["8", "1"], ["1", "8"]):
        subprocess.run([sys.executable, "-P", "-c", program, *groups], env=environment, check=True, timeout=200)
    assert len(list(tmp_path.rglob("*.nbc"))) == 2


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("where", ["query", "keys", "values", "infinite"])
def test_nan_goes_on(where: str, softcap: float | None) -> None:
    case = random_case(("none", "none"), counts=[8] * 6, size=8, lengths=(3, 2), device=CPU)
    if where == "query":
        case.query[0, 1] = torch.nan
    elif where == "values":
        case.values.codes[0, case.table[0, 0], 3] = torch.nan
    else:
        case.query[0, 0] = 1e4
        case.keys.codes[0, case.table[0, 0], 3, 0] = torch.nan if where == "keys" else torch.inf
    ours, theirs = (paged_decode_attention(*case.arguments(), softcap, backend=how) for how in ("numba", "torch"))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)
    assert where == "infinite" or ours[0].isnan().any()


def test_numba_that_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with other packages, and fails where it does not fit numpy."""
    dispatch._numba_is_missing.cache_clear()
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "LEAST_NUMBA", (10**6, 0))
    with pytest.warns(UserWarning, match="run in plain torch: numba is installed, 1000000.0 or newer, not"):
        assert dispatch.choose(CPU, compiled=True) == "torch"
    dispatch._numba_is_missing.cache_clear()


def test_it_is_compiled_where_there_is_no_folder_to_keep_it_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_with(signature: object, cache: bool = False) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'attend_to_lists_2': no locator available for file")
        return lambda function: SimpleNamespace(address=123)

    monkeypatch.setattr(numba_compiler, "cfunc", compile_with)
    assert numba_decode_kernel.compiled.__wrapped__(2) == 123
