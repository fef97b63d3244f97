"""The attention that pages would take, against a formula in float64."""

import importlib.util
import math

import pytest
import torch
from triton_cases import BACKEND, DEVICE, NOWHERE, assert_as_exact, poisoned

from pikv_hf.kernels import decode_pages, page_masses

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = [
    "torch",
    pytest.param("numba", marks=pytest.mark.skipif(DEVICE.type != "cpu", reason="numba runs on a CPU")),
    pytest.param(BACKEND, marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("size", "dim"), [(16, 64), (8, 32), (5, 16), (32, 48)])
def test_page_masses(backend: str, size: int, dim: int) -> None:
    """Slots without a token, entries that are not in use and pages of nobody hold what would show."""
    torch.manual_seed(size)
    heads, groups, pages, columns = 2, 3, 20, 12
    counts = torch.randint(0, size + 1, (pages,))
    counts[:2] = torch.tensor([0, size])
    keys = poisoned(heads, size, dim, "int2", counts, torch.float32, keys=True)
    lengths = torch.tensor([columns - 2, 0, 1], dtype=torch.int32)
    table = torch.randint(0, pages, (3, columns), dtype=torch.int32)
    table[0, :2] = torch.tensor([0, 1])
    table[torch.arange(columns) >= lengths[:, None]] = NOWHERE[1]
    query, scale = torch.randn(3, heads * groups, dim), dim**-0.5
    decoded = decode_pages(keys, torch.float32)
    expected = {}
    for dtype in (torch.float64, torch.float32):
        of_pages = torch.full((3, heads * groups, columns), -math.inf, dtype=dtype)
        for row in range(3):
            for column in range(int(lengths[row])):
                page = int(table[row, column])
                for head in range(heads * groups):
                    own = decoded[head // groups, page, : counts[page]].to(dtype)
                    of_pages[row, head, column] = (own @ query[row, head].to(dtype) * scale).logsumexp(0)
        expected[dtype] = of_pages
    arguments = [x.to(DEVICE) for x in (table, lengths, counts.int())]
    ours = page_masses(query.to(DEVICE), keys.map(lambda t: t.to(DEVICE)), *arguments, scale, backend=backend)
    assert_as_exact([ours], [expected[torch.float32]], [expected[torch.float64]])
    assert (ours[0, :, 0] == -math.inf).all()


def test_shapes_that_do_not_match() -> None:
    keys = poisoned(2, 16, 32, "int2", torch.full((3,), 16), torch.float32, keys=True)
    table, lengths, counts = torch.zeros(1, 2).int(), torch.ones(1).int(), torch.full((3,), 16).int()
    with pytest.raises(ValueError, match=r"\(1, 4, 16\) for 2 KV heads of 32 channels"):
        page_masses(torch.zeros(1, 4, 16), keys, table, lengths, counts, 1.0, backend="torch")
