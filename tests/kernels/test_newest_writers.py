"""Writing newest tokens and their experts on a CPU: compiled as in plain torch, step after step."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.kernels import expert_writer, newest_writer

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def pool_of(heads: int, dims: tuple[int, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return keys, values, positions and experts of six empty pages of five tokens."""
    keys, values = (torch.zeros(heads, 6, 5, dim, dtype=dtype) for dim in dims)
    return keys, values, torch.full((6, 5), -1, dtype=torch.int32), torch.full((6, 5), -1, dtype=torch.int16)


def tokens(rows: int, heads: int, dim: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Return `(rows, heads, 1, dim)` as models make them: transposed, repeated for all rows, or every other channel."""
    if layout == "transposed":
        return torch.randn(rows, 1, heads, dim).to(dtype).transpose(1, 2)
    if layout == "repeated":
        return torch.randn(1, heads, 1, dim).to(dtype).expand(rows, -1, -1, -1)
    return torch.randn(rows, heads, 1, 2 * dim).to(dtype)[..., ::2]


@given(
    slots=st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
    heads=st.integers(1, 3),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.sampled_from(["transposed", "repeated", "strided"]), min_size=1, max_size=3),
)
def test_compiled_as_in_torch(
    slots: list[int], heads: int, dims: tuple[int, int], dtype: torch.dtype, layouts: list[str]
) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    ours, theirs = pool_of(heads, dims, dtype), pool_of(heads, dims, dtype)
    first = torch.tensor([5 * page for page in slots])
    compiled, plain = (
        newest_writer(*pool[:3], first, backend=how) for pool, how in ((ours, "numba"), (theirs, "torch"))
    )
    for offset, layout in enumerate(layouts):
        new = [tokens(len(slots), heads, dim, dtype, layout) for dim in dims]
        compiled(offset, *new, 7 + offset)
        plain(offset, *new, 7 + offset)
    assert all(map(torch.equal, ours, theirs))
    assert (ours[2] >= 0).sum() == len(slots) * len(layouts)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("lanes", [1, 3])
def test_experts_are_noted_by_row_or_for_rows_that_follow(lanes: int, dtype: torch.dtype) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    first = torch.tensor([0, 15, 5, 20, 10, 25])
    chosen = torch.arange(2 * len(first) // lanes, dtype=dtype)[::2] + 40
    by_backend = []
    for how in ("numba", "torch"):
        experts = pool_of(1, (1, 1), torch.float32)[3]
        expert_writer(experts, first, backend=how)(2, chosen)
        by_backend.append(experts)
    assert torch.equal(*by_backend)
    assert by_backend[0].view(-1)[first + 2].tolist() == chosen.repeat_interleave(lanes).tolist()
    assert (by_backend[0] < 0).sum() == 30 - len(first)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_experts_that_do_not_fit_are_refused(backend: str) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    experts = pool_of(1, (1, 1), torch.float32)[3]
    note = expert_writer(experts, torch.tensor([0, 5, 10, 15]), backend=backend)
    for wrong in (torch.arange(3), torch.arange(8), torch.arange(4)[None], torch.arange(0)):
        with pytest.raises(ValueError, match="for 4 slots"):
            note(0, wrong)
    assert (experts == -1).all()
    expert_writer(experts, torch.zeros(0, dtype=torch.int64), backend=backend)(0, torch.arange(0))


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_tokens_that_do_not_fit_are_refused(backend: str) -> None:
    pytest.importorskip("numba", reason="the extra [cpu] is not installed")
    *pool, _ = pool_of(2, (8, 4), torch.float32)
    write = newest_writer(*pool, torch.tensor([0, 5]), backend=backend)
    keys, values = torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 4)
    for wrong in ((keys[:1], values[:1]), (keys[:, :1], values), (keys, keys)):
        with pytest.raises(ValueError, match="for 2 slots of a pool"):
            write(0, *wrong, 0)
    with pytest.raises(TypeError, match=r"float16 for a pool of torch\.float32"):
        write(0, keys, values.half(), 0)
    half = newest_writer(pool[0], pool[1].half(), pool[2], torch.tensor([0, 5]), backend=backend)
    with pytest.raises(TypeError, match=r"float32 for a pool of torch\.float32 and torch\.float16"):
        half(0, keys, values, 0)
    with pytest.raises(ValueError, match="not contiguous"):
        newest_writer(pool[0].transpose(1, 2), *pool[1:], torch.tensor([0, 5]), backend=backend)
    assert (pool[2] == -1).all()
