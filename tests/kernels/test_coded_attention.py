"""The packed format, and attention in compressed space, against decoding first."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf.kernels.bit_packing import pack, unpack
from pikv_hf.kernels.coded_attention import coded_attention
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.encode_pages import encode_pages
from pikv_hf.kernels.page_codes import BITS, KINDS, OUTLIERS, PageCodes, empty_codes, spread_values
from pikv_hf.kernels.partial_attention import partial_attention

coded_module = __import__(coded_attention.__module__, fromlist=["BLOCK_BYTES"])

kinds = st.sampled_from(KINDS)


@given(bits=st.sampled_from([2, 4, 8]), size=st.integers(1, 40), seed=st.integers(0, 99))
def test_packing_loses_nothing(bits: int, size: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (2, 3, size, 5), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.shape == (2, 3, math.ceil(size * bits / 8), 5)
    assert torch.equal(unpack(packed, bits, size), codes.to(torch.uint8))


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
@pytest.mark.parametrize("shift", [0.0, 30.0, -1000.0])
def test_errors_stay_within_a_step(kind: str, shift: float) -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 4, 32, 16) * torch.logspace(-2, 2, 16) + shift
    for keys in (True, False):
        pages = encode_pages(tokens, kind, keys=keys)
        step = spread_values(pages.spread) / (2 ** BITS[kind] - 1)
        error = (decode_pages(pages, torch.float32) - tokens).abs().amax(dim=2)
        # Half a step, and at the ends half of what the range's 8-bit logarithm (1/24 of an octave either way) and the
        # 8-bit floor of values (half of 1/32 of the range) may leave out; values also carry a third of an error on.
        levels = 2 ** BITS[kind] - 1
        slack = levels * (2 ** (1 / 24) - 1 + (0 if keys else 1 / 64)) if kind != "int8" else 0.0
        bound = step * (0.5 + slack + (0 if keys else 0.5 / 3)) * 1.001 + abs(shift) * 1e-6
        assert (error <= bound).all(), float((error / step).max())


def test_wide_channels_of_keys_carry_four_more_bits() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, 50, 32, 64)
    wide = [3, 17, 40, 63]
    tokens[..., wide] *= 80
    pages = encode_pages(tokens, "int4", keys=True)
    assert (pages.outliers.sort(dim=-1).values == torch.tensor(wide)).all()
    error = (decode_pages(pages, torch.float32) - tokens).square().mean(dim=(0, 1, 2)).sqrt()
    ordinary = error[[c for c in range(64) if c not in wide]].mean()
    # Four bits make a step 16 times finer; at 80 times the width that leaves 5 times the error of an ordinary channel.
    assert error[wide].mean() < 6 * ordinary


def test_an_offset_costs_nothing() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 20, 32, 64)
    plain = (decode_pages(encode_pages(tokens, "int4", keys=True), torch.float32) - tokens).square().mean()
    moved = tokens + torch.randn(64) * 100
    shifted = (decode_pages(encode_pages(moved, "int4", keys=True), torch.float32) - moved).square().mean()
    assert shifted < 1.2 * plain


def test_diffused_errors_cancel_over_a_page() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(1, 200, 32, 32)
    errors = {
        keys: decode_pages(encode_pages(tokens, "int4", keys=keys), torch.float32) - tokens for keys in (True, False)
    }
    mean = {keys: float(error.mean(dim=2).square().mean().sqrt()) for keys, error in errors.items()}
    assert mean[False] < 0.8 * mean[True], "a page's mean value should be better kept than its mean key"


@given(kind=kinds, keys=st.booleans(), rank=st.sampled_from([0, 3]))
def test_empty_codes_have_the_shapes_of_sealed_ones(kind: str, keys: bool, rank: int) -> None:
    tokens = torch.randn(2, 3, 5, 9)
    encoded = encode_pages(tokens, kind, keys=keys)
    empty = empty_codes(kind, 2, 5, 9, torch.float32, torch.device("cpu"), keys=keys, rank=rank)
    expected = [(t.shape[0], 0, *t.shape[2:]) for t in encoded.tensors()] + ([(2, 0, 5, 3)] if rank else [])
    assert [tuple(t.shape) for t in empty.tensors()] == expected
    assert [t.dtype for t in empty.tensors()][: len(encoded.tensors())] == [t.dtype for t in encoded.tensors()]
    assert empty.width == 9 + rank


def test_parts_stay_with_their_pages() -> None:
    tokens = torch.randn(2, 6, 8, 16)
    pages = encode_pages(tokens, "int4", keys=True)
    index = torch.tensor([4, 0, 4])
    assert torch.equal(decode_pages(pages.pick(index), torch.float32), decode_pages(pages, torch.float32)[:, index])
    assert torch.equal(decode_pages(pages.narrow(1, 3), torch.float32), decode_pages(pages, torch.float32)[:, 1:3])
    assert pages.outliers.shape[-1] == OUTLIERS


@given(
    key_kind=kinds,
    value_kind=kinds,
    size=st.sampled_from([1, 3, 5, 8, 32]),
    pages=st.integers(1, 7),
    queries=st.sampled_from([1, 4, 33]),
    latent=st.sampled_from([(0, 0), (3, 0), (2, 5)]),
    cap=st.sampled_from([None, 3.0]),
    small=st.booleans(),
    seed=st.integers(0, 99),
)
def test_coded_attention(
    key_kind: str,
    value_kind: str,
    size: int,
    pages: int,
    queries: int,
    latent: tuple[int, int],
    cap: float | None,
    small: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    keys = _with_latent(encode_pages(torch.randn(2, pages, size, 12), key_kind, keys=True), latent[0])
    values = _with_latent(encode_pages(torch.randn(2, pages, size, 10), value_kind, keys=False), latent[1])
    query = torch.randn(2, queries, keys.width)
    bias = torch.zeros(2, queries, pages * size).masked_fill_(torch.rand(2, queries, pages * size) < 0.3, -math.inf)
    holes = (torch.rand(pages * size) < 0.2).nonzero().squeeze(1)
    limits = coded_module.BLOCK_BYTES, coded_module.SPAN_BYTES
    if small:
        coded_module.BLOCK_BYTES, coded_module.SPAN_BYTES = 700, 2000
    try:
        out, lse = coded_attention(query, keys, values, 0.4, bias, holes, cap)
    finally:
        coded_module.BLOCK_BYTES, coded_module.SPAN_BYTES = limits
    dense = (decode_pages(part, torch.float64).flatten(1, 2) for part in (keys, values))
    expected = partial_attention(query.double(), *dense, 0.4, bias.double(), holes, cap)
    # Logits of a few dozen float32 terms of size 1 to 3; partial_attention's own logits are float32 as well.
    torch.testing.assert_close(out.double(), expected[0].double(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected[1].double(), atol=2e-5, rtol=2e-5)


def _with_latent(pages: PageCodes, channels: int) -> PageCodes:
    if not channels:
        return pages
    latent = torch.randn(pages.heads, pages.pages, pages.page_size, channels)
    return PageCodes(*(getattr(pages, name) for name in pages.__slots__[:-1]), latent)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "fp8", "none"])
def test_memory_of_a_long_history_is_bounded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight times the pages raise the largest allocation by nothing."""
    monkeypatch.setattr(coded_module, "SPAN_BYTES", 1 << 20)
    tokens = torch.randn(2, 9600, 32, 64, dtype=torch.bfloat16)
    largest = []
    for pages in (1200, 9600):
        keys, values = (encode_pages(tokens[:, :pages], kind, keys=keys) for keys in (True, False))
        query = torch.randn(2, 8, 64)
        coded_attention(query, keys, values, 0.1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            coded_attention(query, keys, values, 0.1)
        largest.append(max(event.cpu_memory_usage for event in profile.events()))
    assert 0 < largest[1] <= 1.1 * largest[0]
    assert largest[1] <= 4.1 * coded_module.SPAN_BYTES
