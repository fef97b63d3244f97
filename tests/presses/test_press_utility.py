"""What tokens are worth to later queries, against slow and obvious formulas."""

import re

import pytest
import torch

from pikv_hf.allocation.eviction_loss import eviction_loss, output_gram, value_distance
from pikv_hf.eval.studies.presses.attention_estimates import expected_attention, mean_rotation, observed_mass, turn

B, H, G, M, T, D, DV, SCALE = 2, 2, 3, 6, 20, 8, 6, 0.3


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QUERIES, KEYS, VALUES = made(B, H * G, M, D), made(B, H, T, D, seed=1), made(B, H, T, DV, seed=2)
GRAM = output_gram(made(11, H * G * DV, seed=3), H * G)
POSITIONS = torch.tensor([0, 3, 7, 12, 13, 19])


def angles(positions: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 100.0 ** (-torch.arange(0, channels, 2) / channels)
    angle = (positions[:, None] * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def padded(*tensors: torch.Tensor, pad: int = 5) -> list[torch.Tensor]:
    """Put columns in front that would spoil every result they took part in."""
    return [torch.cat([torch.full_like(each[:, :, :pad], 1e4), each], dim=2) for each in tensors]


def real_columns(columns: int, pad: int = 5) -> torch.Tensor:
    return (torch.arange(columns) >= pad).expand(B, -1)


def test_output_gram_measures_what_the_projection_lets_through():
    weight, x = made(11, 12), made(3, 4, seed=1)
    gram = output_gram(weight, 3)
    for head in range(3):
        expected = (weight[:, 4 * head : 4 * head + 4] @ x[head]).square().sum()
        torch.testing.assert_close(x[head] @ gram[head] @ x[head], expected)


def test_output_gram_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="12 columns does not divide by 5 heads"):
        output_gram(made(3, 12), 5)


@pytest.mark.parametrize("start", [0, 2])
def test_turning_moves_a_rotated_state_to_another_position(start):
    at = torch.tensor([3.0, 50.0])
    states = made(4, 2, D)
    turned = turn(turn(states, *angles(at, 6), start=start), *angles(100 - at, 6), start=start)
    torch.testing.assert_close(turned, turn(states, *angles(torch.tensor([100.0, 100.0]), 6), start=start))
    untouched = [channel for channel in range(D) if not start <= channel < start + 6]
    assert torch.equal(turned[..., untouched], states[..., untouched])


def test_turning_refuses_more_angles_than_channels():
    with pytest.raises(ValueError, match="channels 4 to 9 needs more than 8 channels"):
        turn(made(2, 8), *angles(torch.ones(2), 6), start=4)


def test_mean_rotation_is_the_average_over_positions():
    cos, sin = angles(torch.arange(1.0, 9.0), 6)
    states = made(5, D)
    each = torch.stack([turn(states, cos[n], sin[n], start=1) for n in range(len(cos))])
    torch.testing.assert_close(states @ mean_rotation(cos, sin, D, start=1), each.mean(0))


def test_expected_attention_is_that_of_a_normal_distribution_with_the_queries_moments():
    got = expected_attention(QUERIES, KEYS, scale=SCALE)
    for row in range(B):
        for head in range(H):
            heads = []
            for query_head in range(head * G, (head + 1) * G):
                queries = QUERIES[row, query_head].double()
                keys = KEYS[row, head].double()
                mean, cov = queries.mean(0), torch.cov(queries.T, correction=0)
                heads.append(torch.stack([SCALE * mean @ k + SCALE**2 * k @ cov @ k / 2 for k in keys]).softmax(0))
            torch.testing.assert_close(got[row, head].double(), torch.stack(heads).mean(0), atol=1e-6, rtol=1e-4)


def test_expected_attention_agrees_with_drawn_queries():
    spread = made(1, 1, 400, D) * 2 + made(1, 1, 1, D, seed=4)
    mean, cov = spread[0, 0].mean(0), torch.cov(spread[0, 0].T, correction=0)
    drawn = mean + made(400_000, D, seed=5) @ torch.linalg.cholesky(cov).T
    weight = (SCALE * drawn @ KEYS[0, 0].T).exp().mean(0)
    got = expected_attention(spread, KEYS[:1, :1], scale=SCALE)[0, 0]
    torch.testing.assert_close(got, weight / weight.sum(), rtol=0.1, atol=2e-3)


def test_expected_attention_turns_the_moments():
    ahead = mean_rotation(*angles(torch.arange(1.0, 40.0), D), D)
    got = expected_attention(QUERIES, KEYS, scale=SCALE, ahead=ahead)
    torch.testing.assert_close(got, expected_attention(QUERIES @ ahead, KEYS, scale=SCALE))
    assert not torch.allclose(got, expected_attention(QUERIES, KEYS, scale=SCALE), atol=1e-3)


def test_observed_mass_is_the_attention_of_the_queries_that_see_a_key():
    got = observed_mass(QUERIES, POSITIONS, KEYS, scale=SCALE)
    expected = torch.zeros(B, H, T)
    for row in range(B):
        for head in range(H):
            for query_head in range(head * G, (head + 1) * G):
                for query, position in zip(QUERIES[row, query_head], POSITIONS.tolist(), strict=True):
                    seen = (SCALE * KEYS[row, head, : position + 1] @ query).softmax(0)
                    expected[row, head, : position + 1] += seen / G
    expected /= torch.tensor([(token <= POSITIONS).sum() for token in range(T)])
    torch.testing.assert_close(got, expected)


def test_observed_mass_of_what_no_query_sees_is_zero():
    assert not observed_mass(QUERIES, torch.arange(M), KEYS, scale=SCALE)[..., M:].any()


def test_value_distance_is_behind_the_output_projection():
    weight = made(11, H * G * DV, seed=3)
    got = value_distance(VALUES, GRAM)
    for head in range(H):
        for token in range(T):
            centred = VALUES[0, head, token] - VALUES[0, head].mean(0)
            blocks = [weight[:, DV * q : DV * (q + 1)] @ centred for q in range(head * G, (head + 1) * G)]
            torch.testing.assert_close(got[0, head, token], sum(b.square().sum() for b in blocks), rtol=1e-4, atol=1e-4)


def test_what_all_values_share_is_worth_nothing():
    torch.testing.assert_close(value_distance(VALUES + 100, GRAM), value_distance(VALUES, GRAM), rtol=1e-3, atol=1e-1)


def test_padding_changes_nothing():
    keys, values = padded(KEYS, VALUES)
    [queries] = padded(QUERIES, pad=2)
    valid, query_valid = real_columns(T + 5), real_columns(M + 2, pad=2)
    positions = torch.cat([torch.tensor([0, 4]), POSITIONS + 5])
    told = {"scale": SCALE, "valid": valid, "query_valid": query_valid}
    attention = expected_attention(queries, keys, **told)
    torch.testing.assert_close(attention[..., 5:], expected_attention(QUERIES, KEYS, scale=SCALE), rtol=1e-4, atol=1e-6)
    mass = observed_mass(queries, positions, keys, **told)
    torch.testing.assert_close(mass[..., 5:], observed_mass(QUERIES, POSITIONS, KEYS, scale=SCALE))
    distance = value_distance(values, GRAM, valid=valid)
    torch.testing.assert_close(distance[..., 5:], value_distance(VALUES, GRAM))
    loss = eviction_loss(attention, distance, valid=valid)
    alone = eviction_loss(attention[..., 5:], distance[..., 5:])
    torch.testing.assert_close(loss[..., 5:], alone)
    for each in (attention, mass, distance, loss):
        assert not each[..., :5].any()


def test_the_loss_is_probability_times_distance_with_a_share_spread_evenly():
    probability, distance = torch.rand(B, H, T), torch.rand(B, H, T)
    shares = probability / probability.sum(-1, keepdim=True)
    torch.testing.assert_close(eviction_loss(probability, distance, smoothing=0), shares * distance)
    torch.testing.assert_close(eviction_loss(probability, distance, smoothing=1), distance / T)
    torch.testing.assert_close(eviction_loss(probability, distance, smoothing=0.5), (shares + 1 / T) / 2 * distance)
    torch.testing.assert_close(eviction_loss(probability * 7, distance), eviction_loss(probability, distance))


def test_a_lane_that_nothing_is_known_about_counts_evenly():
    loss = eviction_loss(torch.zeros(1, 1, 4), torch.ones(1, 1, 4))
    torch.testing.assert_close(loss, torch.full((1, 1, 4), 0.5 / 4))


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match=re.escape(f"between 0 and 1, got {smoothing}")):
        eviction_loss(torch.ones(1, 1, 2), torch.ones(1, 1, 2), smoothing=smoothing)


def test_query_heads_divide_by_kv_heads():
    with pytest.raises(ValueError, match="5 query heads do not divide by 2 KV heads"):
        expected_attention(made(1, 5, M, D), KEYS[:1], scale=SCALE)
