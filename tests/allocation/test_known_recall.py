"""What is remembered of how well tokens would be recalled is what a plain array of numbers would say."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.allocation.known_recall import KnownRecall, filled_recall

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40))


def dense(shape: tuple[int, ...], seed: int, share: float) -> torch.Tensor:
    """Return random numbers in [0, 1] as they are kept, NaN for some."""
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(shape, generator=generator).bfloat16().float()
    return mass.masked_fill(torch.rand(shape, generator=generator) < share, torch.nan)


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, equal_nan=True, rtol=0, atol=0)


@given(SHAPES, st.integers(0, 99), st.sampled_from([0.0, 0.4, 1.0]), st.data())
def test_it_follows_a_dense_array(shape: tuple[int, ...], seed: int, share: float, data: st.DataObject) -> None:
    mass, first = dense(shape, seed, share), torch.randn(*shape[:2], 4, 8)
    known = KnownRecall.of(mass, first)
    same(known.mass(shape[2]), mass)
    columns = data.draw(st.integers(0, shape[2] + 20))
    padded = torch.nn.functional.pad(mass, (0, 20), value=torch.nan)
    same(known.mass(columns), padded[:, :, :columns])
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=4)))
    same(known.pick(rows).mass(shape[2]), mass[rows])
    same(known.pick(rows).first, first[rows])
    stored = torch.rand(*shape[:2], shape[2] + 5) < 0.5
    same(known.only(stored).mass(shape[2]), mass.masked_fill(~stored[:, :, : shape[2]], torch.nan))
    length = max(1, min(columns, shape[2]))
    same(known.cropped(length).mass(length), mass[:, :, :length])


@given(SHAPES, st.integers(0, 99))
def test_it_takes_two_bytes_for_what_is_known_and_an_eighth_of_one_for_a_column(
    shape: tuple[int, ...], seed: int
) -> None:
    mass = dense(shape, seed, 0.5)
    first = torch.randn(*shape[:2], 4, 8)
    held = sum(tensor.nbytes for tensor in KnownRecall.of(mass, first).tensors())
    lanes = shape[0] * shape[1]
    assert held == 2 * int((~mass.isnan()).sum()) + lanes * math.ceil(shape[2] / 8) + first.nbytes


@given(SHAPES, st.integers(0, 99), st.floats(0, 1))
def test_what_is_not_known_counts_like_most_of_its_head(shape: tuple[int, ...], seed: int, smoothing: float) -> None:
    known = dense(shape, seed, 0.4)
    paid, stored = torch.rand(shape), torch.rand(shape) < 0.8
    filled = filled_recall(known, paid, stored, smoothing)
    assert not bool(filled[~stored].any())
    for row in range(shape[0]):
        for head in range(shape[1]):
            own, here = known[row, head], stored[row, head]
            told, asked = here & ~own.isnan(), here & own.isnan()
            same(filled[row, head][told], own[told])
            usual = float(own[told].mean()) if bool(told.any()) else 0.0
            share = paid[row, head] / paid[row, head][here].mean() if bool(here.any()) else paid[row, head]
            expected = (usual * ((1 - smoothing) * share + smoothing)).clamp(max=1)
            torch.testing.assert_close(filled[row, head][asked], expected[asked])
