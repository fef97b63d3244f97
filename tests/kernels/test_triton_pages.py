"""The other Triton kernels: packing, decoding, scoring and appending pages, merging partial results."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import BACKEND, DEVICE, NOWHERE, assert_as_exact, poisoned

from pikv_hf.kernels import (
    append_newest,
    append_tokens,
    decode_pages,
    encode_pages,
    gather_pages,
    merge_partials,
    page_scores,
)
from pikv_hf.kernels.bit_packing import unpack
from pikv_hf.kernels.page_codes import BITS, KINDS, Kind, PageCodes

pytestmark = pytest.mark.slow

CODED = [kind for kind in KINDS if kind != "none"]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random_tokens(heads: int, pages: int, size: int, dim: int, seed: int) -> torch.Tensor:
    """Return tokens with huge, constant, negative and tiny channels among ordinary ones."""
    torch.manual_seed(seed)
    tokens = torch.randn(heads, pages, size, dim) * torch.exp(2 * torch.randn(heads, pages, 1, dim))
    tokens += 3 * torch.randn(heads, pages, 1, dim)
    tokens[:, :, :, 0], tokens[:, :, :, 1], tokens[:, :, :, 2] = 0, -5, 300 + tokens[:, :, :, 2]
    tokens[0, 0, :, 3] *= 1e-7
    return tokens.to(DEVICE)


def parts(pages: PageCodes) -> dict[str, torch.Tensor | None]:
    names = ("codes", "spread", "floor", "outliers", "fine", "latent")
    return {name: getattr(pages, name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize(("size", "dim"), [(32, 48), (5, 16), (16, 80)])
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("kind", CODED)
def test_encode_pages(kind: Kind, keys: bool, size: int, dim: int) -> None:
    tokens = random_tokens(2, 3, size, dim, seed=size)
    ours = encode_pages(tokens, kind, keys=keys, backend=BACKEND)
    theirs = encode_pages(tokens, kind, keys=keys, backend="torch")
    assert (ours.kind, ours.page_size) == (kind, size)
    for mine, other in zip(parts(ours).values(), parts(theirs).values(), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None and other is not None:
            assert (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
    # The logarithms of GPUs end in other digits, which may move a spread by one code where two are equally near.
    assert (ours.spread.int() - theirs.spread.int()).abs().max() <= 1
    assert (ours.spread == theirs.spread).float().mean() > 0.99
    same = (ours.spread == theirs.spread).unsqueeze(2)
    assert (ours.codes == theirs.codes)[same.expand_as(ours.codes)].float().mean() > 0.99
    errors = [
        (decode_pages(pages, torch.float32) - tokens).abs() / (1e-6 + tokens.abs().amax(2, True))
        for pages in (ours, theirs)
    ]
    assert errors[0].square().mean() <= 1.02 * errors[1].square().mean()


@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
def test_sealed_keys_decode_to_within_their_steps(kind: Kind) -> None:
    """Checked against the format's own words, not another implementation: byte r holds tokens r, r + R, ..."""
    tokens = random_tokens(1, 2, 8, 16, seed=1)
    encoded = encode_pages(tokens, kind, keys=True, backend=BACKEND)
    assert encoded.spread is not None and encoded.floor is not None  # noqa: PT018
    rows, levels = encoded.codes.shape[2], 2 ** BITS[kind] - 1
    for page in range(2):
        for channel in range(16):
            spread = 2 ** ((int(encoded.spread[0, page, channel]) - 120) / 12)
            floor = float(encoded.floor[0, page, channel])
            for token in range(8):
                byte = int(encoded.codes[0, page, token % rows, channel])
                code = byte >> (token // rows * BITS[kind]) & levels
                wanted = min(max(float(tokens[0, page, token, channel]), floor), floor + spread)
                assert abs(floor + spread * code / levels - wanted) <= spread / levels * 0.501


def test_sealed_outliers_are_the_widest_channels_and_their_fine_parts_help() -> None:
    tokens = random_tokens(2, 3, 16, 48, seed=2)
    encoded = encode_pages(tokens, "int4", keys=True, backend=BACKEND)
    assert encoded.spread is not None and encoded.outliers is not None and encoded.fine is not None  # noqa: PT018
    widest = encoded.spread.int().topk(4, dim=-1).values
    assert torch.equal(encoded.spread.int().gather(-1, encoded.outliers.long()), widest)
    assert (encoded.outliers.sort(-1).values.diff(dim=-1) > 0).all()
    plain = PageCodes("int4", 16, encoded.codes, encoded.spread, encoded.floor)
    index = encoded.outliers.long().unsqueeze(2).expand(-1, -1, 16, -1)
    fine, coarse = (
        (decode_pages(p, torch.float32) - tokens).gather(-1, index).square().mean() for p in (encoded, plain)
    )
    assert fine < coarse / 50
    assert len(unpack(encoded.fine, 4, 16).unique()) == 16


def test_encode_pages_takes_any_strides() -> None:
    tokens = random_tokens(2, 3, 16, 32, seed=3)
    apart = torch.stack([tokens] * 2, dim=2)[:, :, 0]
    turned = tokens.transpose(2, 3).contiguous().transpose(2, 3)
    expected = encode_pages(tokens, "int4", keys=True, backend=BACKEND)
    for view in (apart, turned, tokens.half().float()[:, 1:]):
        whole = (
            expected
            if view.shape == tokens.shape
            else encode_pages(view.contiguous(), "int4", keys=True, backend=BACKEND)
        )
        encoded = encode_pages(view, "int4", keys=True, backend=BACKEND)
        assert all(torch.equal(a, b) for a, b in zip(encoded.tensors(), whole.tensors(), strict=True))
    assert encode_pages(tokens[:, :0], "int4", keys=True, backend=BACKEND).pages == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 5])
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("kind", KINDS)
def test_gather_pages(kind: Kind, keys: bool, size: int) -> None:
    torch.manual_seed(size)
    counts = torch.tensor([size, 0, 1, size - 1], dtype=torch.int32)
    latent = 3 if size == 5 else 0
    pool = poisoned(2, size, 24, kind, counts, torch.float32, keys=keys, latent=latent)
    table = torch.tensor([[3, 0, *NOWHERE], [1, *NOWHERE, 9]], dtype=torch.int32)[:, :3].contiguous()
    lengths = torch.tensor([2, 1], dtype=torch.int32)
    where = [x.to(DEVICE) for x in (table, lengths, counts)]
    for dtype in (torch.float32, torch.float16):
        gathered = gather_pages(pool, *where, dtype, backend=BACKEND)
        assert (gathered.shape, gathered.dtype) == ((2, 2, 3 * size, 24 + latent), dtype)
        decoded = decode_pages(pool, torch.float32).cpu()
        expected = torch.zeros(gathered.shape)
        for row, length in enumerate(lengths):
            for column in range(length):
                page = int(table[row, column])
                held = int(counts[page])
                expected[row, :, column * size : column * size + held] = decoded[:, page, :held]
        for actual in (gathered, gather_pages(pool, *where, dtype, backend="torch")):
            # One rounding to the dtype; before it some in float32, of a logarithm up to 10 that becomes a factor.
            error = torch.finfo(dtype).eps * expected.abs() + 2.0**-20 * expected.abs().max()
            assert ((actual.float().cpu() - expected).abs() <= error).all()


def test_gather_from_an_empty_pool() -> None:
    pool = poisoned(2, 8, 16, "int4", torch.zeros(0, dtype=torch.int32), torch.float32, keys=True)
    nothing = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    table = torch.full((2, 3), NOWHERE[0], dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    gathered = gather_pages(pool, table, lengths, nothing, torch.float16, backend=BACKEND)
    assert torch.equal(gathered.cpu(), torch.zeros(2, 2, 24, 16, dtype=torch.float16))
    assert gather_pages(pool, table[:, :0], lengths, nothing, torch.float16, backend=BACKEND).shape == (2, 2, 0, 16)


@pytest.mark.parametrize("summary", ["centroid", "bounds", "half bounds", "bounds beside each other", "spread"])
def test_page_scores(summary: str) -> None:
    torch.manual_seed(0)
    heads, pages, dim, groups, columns = 2, 50, 24, 3, 40
    low = torch.randn(heads, pages, dim)
    high: torch.Tensor | None = low + torch.rand(heads, pages, dim)
    if summary == "centroid":
        high = None
    elif summary == "half bounds":
        low, high = low.half(), (low.half() + 1)
    elif summary == "bounds beside each other":
        low, high = torch.cat([low, high], dim=2).split(dim, dim=2)
    elif summary == "spread":
        low, high = low.half(), torch.randint(0, 160, low.shape, dtype=torch.uint8)
    lengths = torch.tensor([columns - 3, 0, 1], dtype=torch.int32)
    table = torch.randint(0, pages, (3, columns), dtype=torch.int32)
    table[torch.arange(columns) >= lengths[:, None]] = NOWHERE[1]
    query = torch.randn(3, heads * groups, dim)
    query = query.half() if low.dtype == torch.float16 else query
    arguments = [None if x is None else x.to(DEVICE) for x in (query, low, high, table, lengths)]
    expected = torch.full((3, heads, columns), -math.inf, dtype=torch.float64)
    for row, head in ((row, head) for row in range(3) for head in range(heads)):
        for column in range(int(lengths[row])):
            page = table[row, column]
            least = low[head, page].double()
            most = least
            if high is not None:
                most = high[head, page].double()
                most = least + 2 ** ((most - 120) / 12) if summary == "spread" else most
            q = query[row, head * groups : head * groups + groups].double()
            expected[row, head, column] = torch.maximum(q * least, q * most).sum(1).max()
    ours, theirs = (page_scores(*arguments, backend=backend) for backend in (BACKEND, "torch"))
    assert_as_exact([ours], [theirs], [expected])
    torch.testing.assert_close(theirs.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_page_scores_of_no_pages() -> None:
    low = torch.zeros(2, 0, 16, device=DEVICE)
    table = torch.full((1, 2), NOWHERE[0], dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    scores = page_scores(torch.randn(1, 4, 16, device=DEVICE), low, None, table, lengths, backend=BACKEND)
    assert torch.equal(scores.cpu(), torch.full((1, 2, 2), -math.inf))


@settings(max_examples=20)
@given(
    count=st.integers(1, 20),
    batch=st.integers(1, 3),
    dim=st.sampled_from([5, 64, 80]),
    sinks=st.booleans(),
    empty=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_merge_partials(count: int, batch: int, dim: int, sinks: bool, empty: float, seed: int) -> None:
    torch.manual_seed(seed)
    outs, lses = torch.randn(count, batch, 3, dim), 20 * torch.randn(count, batch, 3)
    lses[torch.rand(lses.shape) < empty] = -math.inf
    outs[lses == -math.inf] = 1e30
    sink = torch.randn(3) * 20 if sinks else None
    logs = lses.double()
    weights = torch.exp(logs - logs.amax(0).clamp_min(-1e9))
    total = weights.sum(0)
    lse = total.log() + logs.amax(0)
    if sink is not None:
        total = total + torch.exp(sink.double() - logs.amax(0).clamp_min(-1e9))
    total = total.masked_fill(weights.sum(0) == 0, 1)
    expected = ((weights / total)[..., None] * outs.double()).sum(0), lse
    arguments = [None if x is None else x.to(DEVICE) for x in (outs, lses, sink)]
    ours, theirs = (merge_partials(*arguments, backend=backend) for backend in (BACKEND, "torch"))
    assert_as_exact(ours, theirs, expected)
    for actual, truth in zip(theirs, expected, strict=True):
        torch.testing.assert_close(actual.cpu().double(), truth, rtol=1e-5, atol=1e-5)


def test_merge_partials_names_both_shapes() -> None:
    outs, lses = torch.zeros(2, 1, 3, 8, device=DEVICE), torch.zeros(2, 1, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(2, 1, 3, 8\) with lses \(2, 1, 4\)"):
        merge_partials(outs, lses, backend=BACKEND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_append_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pool = torch.zeros(2, 6, 5, 12, dtype=dtype)[:, 1:].to(DEVICE)
    tokens = (torch.rand(19, 2, 12) * 200).to(dtype).to(DEVICE).transpose(0, 1)
    slots = torch.randperm(25, device="cpu")[:19].to(DEVICE)
    append_tokens(pool, slots, tokens, backend=BACKEND)
    expected = torch.zeros(2, 5, 5, 12, dtype=dtype)
    for n, slot in enumerate(slots.tolist()):
        expected[:, slot // 5, slot % 5] = tokens[:, n].cpu()
    assert torch.equal(pool.cpu(), expected)
    append_tokens(pool, slots[:0], tokens[:, :0], backend=BACKEND)
    assert torch.equal(pool.cpu(), expected)


def test_append_tokens_names_what_does_not_match() -> None:
    pool = torch.zeros(2, 3, 4, 8, device=DEVICE)
    slots = torch.arange(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(2, 3, 8\) for 2 slots of a pool \(2, 3, 4, 8\)"):
        append_tokens(pool, slots, torch.zeros(2, 3, 8, device=DEVICE), backend=BACKEND)
    with pytest.raises(TypeError, match=r"float16 for a pool of torch\.float32"):
        append_tokens(pool, slots, torch.zeros(2, 2, 8, device=DEVICE).half(), backend=BACKEND)


@pytest.mark.parametrize("backend", ["torch", BACKEND])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_append_newest(dtype: torch.dtype, backend: str) -> None:
    """Keys, values and positions of one token per row, of any strides, into a pool within a larger one."""
    torch.manual_seed(0)
    keys_of, values_of = (torch.zeros(2, 6, 5, dim, dtype=dtype, device=DEVICE)[:, 1:] for dim in (12, 7))
    positions = torch.full((5, 5), -1, dtype=torch.int32, device=DEVICE)
    keys = torch.randn(3, 1, 2, 12, dtype=dtype, device=DEVICE).transpose(1, 2)
    values = torch.randn(7, 2, 3, dtype=dtype, device=DEVICE).permute(2, 1, 0)[:, :, None]
    slots = torch.tensor([20, 3, 6], device=DEVICE)
    append_newest(keys_of, values_of, positions, slots, 2, keys, values, 77, backend=backend)
    for stored, tokens in ((keys_of, keys), (values_of, values)):
        expected = torch.zeros_like(stored, memory_format=torch.contiguous_format).flatten(1, 2)
        for row, slot in enumerate((22, 5, 8)):
            expected[:, slot] = tokens[row, :, 0]
        assert torch.equal(stored.flatten(1, 2), expected)
    assert torch.nonzero(positions.view(-1) == 77).view(-1).tolist() == [5, 8, 22]
    assert (positions == -1).sum() == 22
    append_newest(keys_of, values_of, positions, slots[:0], 0, keys[:0], values[:0], 78, backend=backend)
    assert not (positions == 78).any()


def test_append_newest_names_what_does_not_match() -> None:
    pool, positions = torch.zeros(2, 3, 4, 8, device=DEVICE), torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    slots, tokens = torch.arange(2, device=DEVICE), torch.zeros(2, 2, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 8\) .* for 2 slots of a pool \(2, 3, 4, 8\)"):
        append_newest(pool, pool, positions, slots, 0, torch.zeros(2, 3, 1, 8, device=DEVICE), tokens, 0)
    with pytest.raises(TypeError, match=r"float16 for a pool of torch\.float32"):
        append_newest(pool, pool, positions, slots, 0, tokens, tokens.half(), 0)
    with pytest.raises(ValueError, match="not contiguous"):
        append_newest(pool.transpose(1, 2), pool, positions, slots, 0, tokens, tokens, 0, backend=BACKEND)
