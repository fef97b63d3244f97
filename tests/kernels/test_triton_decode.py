"""The Triton kernel of the decode step against float64: compiled on a GPU, else interpreted on the CPU."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import BACKEND, DEVICE, GPU, Case, assert_as_exact, check, naive_attention, random_case

from pikv_hf.kernels import dispatch, paged_decode_attention
from pikv_hf.kernels.page_codes import KINDS, Kind, PageCodes

pytestmark = pytest.mark.slow

BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not GPU, reason="Triton's interpreter computes bfloat16 dots wrongly")
)
DTYPES = [torch.float32, torch.float16, BFLOAT16]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


ALIKE: list[tuple[Kind, Kind]] = [(kind, kind) for kind in KINDS]
MIXED: list[tuple[Kind, Kind]] = [("int4", "int2"), ("int2", "int4"), ("fp8", "int8"), ("none", "int4")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", [*ALIKE, *MIXED], ids="-".join)
def test_kinds(kinds: tuple[Kind, Kind], dtype: torch.dtype) -> None:
    check(random_case(kinds, dtype))


@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_head_dims(dims: tuple[int, int]) -> None:
    kinds: tuple[Kind, Kind] = (
        ("none", "int8") if dims[0] == 80 else ("int4", "none") if dims[0] == 96 else ("int4", "int4")
    )
    check(random_case(kinds, torch.float16, heads=1, groups=8, dims=dims, lengths=(2, 3)))


def test_pages_as_they_are_may_have_an_odd_number_of_channels() -> None:
    check(random_case(("none", "none"), dims=(17, 5), lengths=(2,)))


@pytest.mark.parametrize("groups", [1, 4, 8, 16, 21])
def test_query_heads_of_a_kv_head(groups: int) -> None:
    check(random_case(("int4", "fp8"), groups=groups, lengths=(2,)))


# int2 and int4 of a page of 5 have their tokens in rows that do not match; below 16 tokens a page is no operand.
@pytest.mark.parametrize("size", [5, 8, 16, 32, 64])
@pytest.mark.parametrize("kinds", [("none", "none"), ("int4", "int2"), ("int2", "int8"), ("fp8", "int4")], ids="-".join)
def test_page_sizes(kinds: tuple[Kind, Kind], size: int) -> None:
    check(random_case(kinds, heads=1, size=size, lengths=(3,)))


@pytest.mark.slow
@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    counts=st.lists(st.integers(0, 8), min_size=4, max_size=6),
    splits=st.integers(1, 4),
    kind=st.sampled_from(["none", "int4"]),
    seed=st.integers(0, 9),
)
def test_rows_of_any_length(lengths: list[int], counts: list[int], splits: int, kind: Kind, seed: int) -> None:
    """One token, one page, ragged rows, empty rows, empty pages, and parts of a row without a page."""
    case = random_case(
        (kind, kind), heads=1, groups=2, size=8, dims=(16, 16), lengths=lengths, counts=counts, seed=seed
    )
    check(case, tuning={"splits": splits})


def test_no_rows_and_no_pages() -> None:
    case = random_case(lengths=())
    out, lse = paged_decode_attention(*case.arguments(), backend=BACKEND)
    assert (out.shape, lse.shape) == ((0, 8, 32), (0, 8))
    case = random_case(lengths=(0, 0), counts=[])
    out, lse, page_lse = paged_decode_attention(*case.arguments(), page_lse=True, backend=BACKEND)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert (page_lse == -torch.inf).all()


@pytest.mark.parametrize("kinds", [("int4", "int4"), ("none", "fp8")], ids="-".join)
def test_latent_channels(kinds: tuple[Kind, Kind]) -> None:
    check(random_case(kinds, torch.float16, groups=4, latents=(5, 3), lengths=(2, 3)))
    check(random_case(kinds, latents=(0, 20), lengths=(2,)))


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_float16_holds_queries_times_steps(kind: Kind, factor: float) -> None:
    """Neither large keys nor small ones leave the range that float16 has for queries and keys themselves."""
    check(random_case((kind, "none"), torch.float16, factor=factor))


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap: float) -> None:
    case = random_case(("int8", "int4"), lengths=(2, 1))
    check(case, softcap)
    check(Case(case.query * 1000, *case.arguments()[1:]), softcap)


def test_a_pool_may_be_part_of_a_larger_one() -> None:
    """Its heads are then further apart than its pages say."""
    case = random_case(("int4", "int4"), lengths=(3,))

    def within_a_larger_pool(pages: PageCodes) -> PageCodes:
        def widen(tensor: torch.Tensor) -> torch.Tensor:
            spare = tensor[:, :1].expand(-1, 3, *tensor.shape[2:])
            return torch.cat([spare, tensor, spare], dim=1)

        return pages.map(widen).narrow(3, 3 + pages.pages)

    wider = Case(case.query, within_a_larger_pool(case.keys), within_a_larger_pool(case.values), *case.arguments()[3:])
    results = [paged_decode_attention(*c.arguments(), backend=BACKEND) for c in (case, wider)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tables_and_queries_need_not_be_contiguous() -> None:
    case = random_case(lengths=(2, 3), dtype=torch.float16)
    spread = Case(
        torch.stack([case.query] * 2, dim=-1)[..., 0],
        case.keys,
        case.values,
        torch.cat([case.table, case.table], dim=1)[:, : case.table.shape[1]],
        *case.arguments()[4:],
    )
    assert not spread.table.is_contiguous()
    results = [paged_decode_attention(*c.arguments(), backend=BACKEND) for c in (case, spread)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tuning", [{"num_warps": 2, "num_stages": 1}, {"programs_per_processor": 3}, {"splits": 5}])
def test_launch_parameters_do_not_change_the_result(tuning: dict[str, int]) -> None:
    check(random_case(lengths=(4, 2)), tuning=tuning)


def test_rows_are_cut_into_enough_parts_to_fill_a_gpu_and_no_more() -> None:
    count = dispatch.load("paged_decode_attention", BACKEND).split_count
    assert 0.85 * 1056 <= 8 * count(8, 4096, 1056) <= 1056
    assert count(8, 40, 1056) in (9, 10)
    assert count(8, 3, 1056) == count(8, 0, 1056) == count(0, 100, 1056) == 1
    assert count(1056, 4096, 1056) == count(5000, 4096, 1056) == 1
    # One round of 600 programs would leave 43% of the GPU idle, and so would two of them.
    rounds = 600 * count(600, 4096, 1056) / 1056
    assert rounds / math.ceil(rounds) > 0.8
    assert 200 < count(1, 10**6, 10**6) <= 256


def test_what_a_caller_can_get_wrong() -> None:
    case = random_case(lengths=(2,))
    query, keys, values, table, lengths, counts, scale = case.arguments()

    def attend(**changed: object) -> None:
        arguments = {"query": query, "keys": keys, "values": values, "table": table, "lengths": lengths} | changed
        paged_decode_attention(**{"counts": counts, "scale": scale, "backend": BACKEND} | arguments)

    with pytest.raises(ValueError, match=r"num_wraps.*num_warps"):
        attend(tuning={"num_wraps": 1})
    with pytest.raises(ValueError, match=r"\(1, 5, 32\) for 2 KV heads of 32"):
        attend(query=query[:, :5])
    with pytest.raises(ValueError, match=r"values 2 of 5 of 16"):
        attend(values=values.narrow(0, 5))
    with pytest.raises(ValueError, match="for 1 rows"):
        attend(lengths=lengths.repeat(2))
    with pytest.raises(ValueError, match="for 6 pages"):
        attend(counts=counts[:5])
    with pytest.raises(TypeError, match="keys for values"):
        attend(values=keys)
    with pytest.raises(ValueError, match="not contiguous"):
        attend(keys=keys.map(lambda tensor: torch.stack([tensor] * 2, dim=2)[:, :, 0]))
    odd = random_case(dims=(33, 32), lengths=(2,))
    with pytest.raises(ValueError, match="33"):
        paged_decode_attention(*odd.arguments(), backend=BACKEND)


def test_the_bound_is_tight_enough_to_see_an_error() -> None:
    """What is compared above differs by more than the bound as soon as one page is missing."""
    case = random_case(lengths=(3,), dtype=torch.float16, counts=[16] * 4)
    less = Case(*case.arguments()[:4], torch.full_like(case.lengths, 2), *case.arguments()[5:])
    actual = paged_decode_attention(*less.arguments(), backend=BACKEND)
    yardstick = paged_decode_attention(*case.arguments(), backend="torch")
    with pytest.raises(AssertionError, match="torch's"):
        assert_as_exact(actual, yardstick, naive_attention(case)[:2])
    assert case.query.device.type == DEVICE.type
