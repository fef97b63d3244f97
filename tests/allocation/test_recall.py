"""Recall against the formula, token by token in float64; turns against rotations of every layout."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.allocation.query_turn import RotaryLayout, Turn
from pikv_hf.allocation.recall import BLOCK, SINKS, recall_mass

HEADS, GROUPS, DIM = 2, 2, 8


def expected(query, moved, keys, scale, softcap, sink, first):
    """Return `(T,)` of one KV head: `(G, T, D)` queries, `(T, D)` keys, in float64 and one query after the other."""
    groups, tokens, _ = query.shape
    best = [0.0] * tokens
    for group in range(groups):
        for at in range(tokens):
            block = at // BLOCK
            near = [j for j in range(tokens) if abs(j // BLOCK - block) <= 1]

            def logit(q, k):
                value = scale * float(q @ k)
                return value if softcap is None else softcap * math.tanh(value / softcap)

            recalled = {j: logit(moved[group, at], keys[j]) for j in near}
            others = [logit(query[group, at], keys[j]) for j in near if j // BLOCK <= block and j <= at]
            if first is None:
                others += [logit(moved[group, at], keys[j]) for j in range(min(SINKS, tokens)) if j not in near]
            else:
                others += [logit(moved[group, at], key) for key in first]
            if sink is not None:
                others.append(float(sink[group]))
            top = max([*recalled.values(), *others])
            total = sum(math.exp(value - top) for value in [*recalled.values(), *others])
            for j, value in recalled.items():
                best[j] = max(best[j], math.exp(value - top) / total)
    return torch.tensor(best)


@given(
    tokens=st.sampled_from([1, 2, 63, 64, 65, 150]),
    padding=st.integers(0, 70),
    softcap=st.sampled_from([None, 3.0]),
    has_sinks=st.booleans(),
    later=st.booleans(),
    seed=st.integers(0, 9),
)
def test_recall_is_what_the_formula_says(tokens, padding, softcap, has_sinks, later, seed) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = 2, HEADS * GROUPS, tokens + padding, DIM
    query, moved = torch.randn(2, *shape, generator=draw) * 2
    keys = torch.randn(2, HEADS, tokens + padding, DIM, generator=draw) * 2
    valid = torch.ones(2, tokens + padding, dtype=torch.bool)
    valid[1, :padding] = False
    sinks = torch.randn(HEADS * GROUPS, generator=draw) if has_sinks else None
    first = torch.randn(2, HEADS, SINKS, DIM, generator=draw) if later else None
    given_valid = valid if padding else None
    got = recall_mass(query, moved, keys, scale=0.4, valid=given_valid, sinks=sinks, softcap=softcap, first=first)
    assert bool((got[1, :, :padding] == 0).all())
    for row, head in ((0, 0), (1, 1)):
        own, real = slice(head * GROUPS, (head + 1) * GROUPS), valid[row]
        parts = (part[row, own][:, real].double() for part in (query, moved))
        sink = None if sinks is None else sinks[own]
        start = None if first is None else first[row, head].double()
        reference = expected(*parts, keys[row, head, real].double(), 0.4, softcap, sink, start)
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
