"""The torch operations against slow, obvious references in float64."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.kernels import append_tokens, causal_attention, gather_dense, merge_pair, partial_attention
from pikv_hf.kernels import partial_attention as module_function
from pikv_hf.kernels.coded_attention import coded_attention
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.merge_partials import merge_sinks

partial_module = __import__(module_function.__module__, fromlist=["MAX_LOGITS"])


def naive(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    visible: torch.Tensor,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one lane, query by query, over the tokens that each may see."""
    out = torch.zeros(query.shape[0], values.shape[-1], dtype=torch.float64)
    lse = torch.full((query.shape[0],), -math.inf, dtype=torch.float64)
    for i, q in enumerate(query.double()):
        seen = visible[i].nonzero().squeeze(1)
        if len(seen):
            logits = keys[seen].double() @ q * scale
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            lse[i] = torch.logsumexp(logits, 0)
            out[i] = torch.softmax(logits, 0) @ values[seen].double()
    return out, lse


sizes = {
    "lanes": st.integers(1, 4),
    "queries": st.integers(1, 5),
    "tokens": st.integers(1, 40),
    "seed": st.integers(0, 99),
}


@given(
    **sizes,
    dims=st.sampled_from([(16, 16), (24, 10), (5, 7)]),
    cap=st.sampled_from([None, 3.0]),
    block=st.sampled_from([1, 37, 1 << 20]),
)
def test_partial_attention(
    lanes: int, queries: int, tokens: int, seed: int, dims: tuple[int, int], cap: float | None, block: int
) -> None:
    torch.manual_seed(seed)
    query, keys, values = (
        torch.randn(lanes, n, d) for n, d in ((queries, dims[0]), (tokens, dims[0]), (tokens, dims[1]))
    )
    visible = torch.rand(lanes, queries, tokens) < 0.7
    holes = (torch.rand(tokens) < 0.2).nonzero().squeeze(1)
    keys[:, holes] = math.nan  # Slots without a token may hold anything as keys ...
    values[:, holes] = 1e30  # ... and anything finite as values.
    bias = torch.zeros(visible.shape).masked_fill_(~visible, -math.inf)
    visible[:, :, holes] = False
    limit, partial_module.MAX_LOGITS = partial_module.MAX_LOGITS, block
    try:
        out, lse = partial_attention(query, keys, values, 0.5, bias, holes, cap)
    finally:
        partial_module.MAX_LOGITS = limit
    for lane in range(lanes):
        expected_out, expected_lse = naive(query[lane], keys[lane], values[lane], 0.5, visible[lane], cap)
        torch.testing.assert_close(out[lane].double(), expected_out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[lane].double(), expected_lse, atol=1e-5, rtol=1e-5)


@given(**sizes, group=st.integers(1, 3), history=st.integers(0, 9), block=st.sampled_from([1, 50, 1 << 20]))
def test_causal_attention(
    lanes: int, queries: int, tokens: int, seed: int, group: int, history: int, block: int
) -> None:
    torch.manual_seed(seed)
    total = queries + history
    query = torch.randn(lanes, 2, group, queries, 8)
    keys, values = torch.randn(lanes, 2, total, 8), torch.randn(lanes, 2, total, 6)
    limit, partial_module.MAX_LOGITS = partial_module.MAX_LOGITS, block
    try:
        out, lse = causal_attention(query, keys, values, 0.3)
    finally:
        partial_module.MAX_LOGITS = limit
    visible = torch.ones(queries, total, dtype=torch.bool).tril(history)
    for lane in range(lanes):
        for head in range(2):
            for g in range(group):
                expected, expected_lse = naive(
                    query[lane, head, g], keys[lane, head], values[lane, head], 0.3, visible, None
                )
                torch.testing.assert_close(out[lane, head, g].double(), expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(lse[lane, head, g].double(), expected_lse, atol=1e-5, rtol=1e-5)


@given(cut=st.integers(0, 12), seed=st.integers(0, 99))
def test_merging_parts_equals_the_whole(cut: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, keys, values = torch.randn(2, 3, 8), torch.randn(2, 12, 8) * 4, torch.randn(2, 12, 5)
    whole = partial_attention(query, keys, values, 1.0)
    everything = torch.arange(12)
    parts = [
        partial_attention(query, keys, values, 1.0, holes=everything[h]) for h in (slice(cut, None), slice(0, cut))
    ]
    for merged, expected in zip(merge_pair(*parts[0], *parts[1]), whole, strict=True):
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_merging_nothing_gives_nothing() -> None:
    out, lse = merge_pair(*(torch.zeros(2, 3), torch.full((2,), -math.inf)) * 2)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_sinks_take_their_share() -> None:
    """A sink is a key whose value is zero."""
    query, keys, values = torch.randn(1, 2, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 4)
    out, lse = partial_attention(query, keys, values, 1.0)
    sink = 0.7
    logits = torch.cat([query @ keys.transpose(1, 2), torch.full((1, 2, 1), sink)], dim=-1)
    expected = torch.softmax(logits, -1) @ torch.cat([values, torch.zeros(1, 1, 4)], dim=1)
    merged = merge_sinks(out[:, None], lse[:, None], torch.tensor([sink]))
    torch.testing.assert_close(merged[:, 0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_error_is_at_most_twice_torchs(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(4, 8, 64), torch.randn(4, 300, 64), torch.randn(4, 300, 64)
    exact = torch.softmax(query @ keys.transpose(1, 2) * 0.125, -1) @ values
    half = [t.to(dtype) for t in (query, keys, values)]
    torchs = torch.nn.functional.scaled_dot_product_attention(*half, scale=0.125).float()
    ours, _ = partial_attention(*half, 0.125)
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()


def test_gather_and_append_are_inverse() -> None:
    pool = torch.zeros(2, 5, 4, 3)
    tokens = torch.randn(2, 8, 3)
    slots = torch.tensor([12, 13, 14, 15, 4, 5, 6, 7])
    append_tokens(pool, slots, tokens)
    gathered = gather_dense(pool, torch.tensor([[3, 1], [1, 3]]))
    assert gathered.shape == (2, 2, 8, 3)
    assert torch.equal(gathered[:, 0], tokens)
    assert torch.equal(gathered[:, 1], tokens.roll(4, dims=1))
    assert (pool[:, [0, 2, 4]] == 0).all()


def test_a_masked_history_is_read_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding layer's chunk over a long history gives the same in one piece and in many."""
    from families import FAMILIES

    from pikv_hf import PiKVCache
    from pikv_hf.attention import paged_attention as page_attention

    model = FAMILIES["mixtral_sliding"].build(num_hidden_layers=1)
    ids = torch.randint(2, 190, (2, 300))

    def logits() -> torch.Tensor:
        cache = PiKVCache.for_model(model, page_size=4, recent_window=8, sliding_layers="paged")
        with torch.no_grad():
            model(ids[:, :280], past_key_values=cache)
            return model(ids[:, 280:], past_key_values=cache).logits

    whole = logits()
    monkeypatch.setattr(page_attention, "MAX_LOGITS", 2000)
    torch.testing.assert_close(logits(), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("max_logits", [1 << 23, 200])
@pytest.mark.parametrize("kind", ["none", "int4"])
@pytest.mark.parametrize("queries", [3, 20])
def test_the_lse_of_each_page(
    monkeypatch: pytest.MonkeyPatch, max_logits: int, kind: Literal["none", "int4"], queries: int
) -> None:
    monkeypatch.setattr(partial_module, "MAX_LOGITS", max_logits)
    torch.manual_seed(0)
    query, tokens = torch.randn(2, queries, 16), torch.randn(2, 8, 8, 16)
    holes = torch.tensor([3, 5, 17])
    filled = torch.empty(2, queries, 8)
    if kind == "none":
        keys, values = tokens.flatten(1, 2), tokens.flatten(1, 2)
        partial_attention(query, keys, values, 0.3, None, holes, None, filled)
    else:
        codes = encode_pages(tokens, kind, keys=True)
        coded_attention(query, codes, encode_pages(tokens, kind, keys=False), 0.3, None, holes, None, filled)
        keys = decode_pages(codes, torch.float32).flatten(1, 2)
    logits = query.double() @ keys.double().transpose(1, 2) * 0.3
    logits[:, :, holes] = -torch.inf
    expected = logits.unflatten(2, (8, 8)).logsumexp(dim=-1)
    # A page's sum of 8 numbers in float32, and the logarithm's own rounding.
    assert (filled - expected).abs().max() < 1e-5
