"""Which rows are equal, against comparing every row with every other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.page_table.equal_rows import equal_rows


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=6))
def test_rows_are_equal_to_the_first_that_has_the_same_in_all_tensors(rows: list[tuple[int, ...]]) -> None:
    past, last, rest = (torch.tensor(column).view(-1, 1) for column in zip(*rows, strict=True))
    assert equal_rows([past, last], [rest, None]) == [rows.index(row) for row in rows]


def test_nothing_equals_what_is_not_a_number() -> None:
    assert equal_rows([torch.zeros(3, 2)], [torch.tensor([[1.0], [torch.nan], [torch.nan]])]) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(4, 2, 0, 3), (4, 0)])
def test_rows_without_an_entry_are_equal(shape: tuple[int, ...]) -> None:
    assert equal_rows([torch.zeros(shape)], [torch.zeros(shape)]) == [0, 0, 0, 0]
