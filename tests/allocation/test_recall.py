"""Recall against the formula, token by token in float64; turns against rotations of every layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recall_reference import expected_recall

from pikv_hf.allocation import recall
from pikv_hf.allocation.query_turn import RotaryLayout, Turn
from pikv_hf.allocation.recall import SINKS, recall_mass

HEADS, GROUPS, DIM = 2, 2, 8
LAYOUT = RotaryLayout("halves", "once")


@given(
    tokens=st.sampled_from([1, 2, 31, 32, 33, 64, 150]),
    at_once=st.sampled_from([1, 1 << 14, 1 << 18]),
    padding=st.integers(0, 70),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
    later=st.booleans(),
    seed=st.integers(0, 9),
)
def test_recall_is_what_the_formula_says(tokens, padding, softcap, has_sinks, later, at_once, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = 2, HEADS * GROUPS, tokens + padding, DIM
    query = torch.randn(shape, generator=draw) * 2
    keys = torch.randn(2, HEADS, tokens + padding, DIM, generator=draw) * 2
    valid = torch.ones(2, tokens + padding, dtype=torch.bool)
    valid[1, :padding] = False
    sinks = torch.randn(HEADS * GROUPS, generator=draw) if has_sinks else None
    first = torch.randn(2, HEADS, SINKS, DIM, generator=draw) if later else None
    turn = Turn(torch.tensor([[[0.6, 0.0, 1.0, -0.8]]]), torch.tensor([[[0.8, 1.0, 0.0, -0.6]]]), LAYOUT)
    moved, back = turn(query), turn.back()
    given = {"valid": valid if padding else None, "sinks": sinks, "softcap": softcap}
    start = None if first is None else back(first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recall, "LOGITS_AT_ONCE", at_once)
        got = recall_mass(query, keys, back(keys), scale=0.4, first=start, **given)
    assert bool((got[1, :, :padding] == 0).all())
    for row, head in ((0, 0), (1, 1)):
        own, real = slice(head * GROUPS, (head + 1) * GROUPS), valid[row]
        parts = (part[row, own][:, real] for part in (query, moved))
        sink = None if sinks is None else sinks[own]
        start = None if first is None else first[row, head]
        reference = expected_recall(*parts, keys[row, head, real], 0.4, softcap, sink, start)
        # A float32 softmax over logits of at most 60.
        torch.testing.assert_close(got[row, head, real], reference.float(), rtol=1e-4, atol=1e-6)


def rotated(states, positions, frequencies, layout):
    """Return `(T, D)` states at positions, channel pair by channel pair as complex numbers."""
    size, count = states.shape[-1], 2 * len(frequencies)
    start = size - count if layout.last else 0
    out = states.clone()
    for i, frequency in enumerate(frequencies):
        a, b = (start + i, start + i + count // 2) if layout.pairs == "halves" else (start + 2 * i, start + 2 * i + 1)
        turned = torch.complex(states[:, a], states[:, b]) * torch.exp(1j * positions * frequency)
        out[:, a], out[:, b] = turned.real, turned.imag
    return out


@given(layout=st.sampled_from([each for each in RotaryLayout.all() if each.pairs != "none"]), seed=st.integers(0, 9))
def test_a_turn_goes_from_one_position_to_another(layout: RotaryLayout, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(3, generator=draw, dtype=torch.float64)
    states = torch.randn(5, 10, generator=draw, dtype=torch.float64)
    positions = torch.randint(0, 50, (5,), generator=draw).double()
    angles = torch.arange(60).double()[:, None] * frequencies
    if layout.angles == "twice":
        angles = torch.cat([angles, angles], dim=-1)
    if layout.angles == "repeated":
        angles = angles.repeat_interleave(2, dim=-1)
    factor = 1.3
    table = factor * angles.cos()[None].float(), factor * angles.sin()[None].float()
    start, end = (tuple(part[:, at : at + 1] for part in table) for at in (7, 40))
    turn = Turn.between(start, end).by(layout)
    got = turn(rotated(states, positions, frequencies, layout)[None, None])
    later = rotated(states, positions + 33, frequencies, layout)
    torch.testing.assert_close(got[0, 0], later.float(), rtol=1e-4, atol=1e-5)


def test_a_module_that_rotates_nothing_leaves_queries_as_they_are() -> None:
    states = torch.randn(1, 2, 3, 4)
    turn = Turn(torch.zeros(1, 1, 2), torch.ones(1, 1, 2), RotaryLayout())
    assert torch.equal(turn(states), states)


def test_more_angles_than_channels() -> None:
    with pytest.raises(ValueError, match="rotating 12 channels needs as many, got 8"):
        Turn(torch.ones(1, 1, 6), torch.zeros(1, 1, 6), RotaryLayout("halves"))(torch.zeros(1, 1, 1, 8))
