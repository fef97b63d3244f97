"""The Triton kernel of latent attention's decode step against float64: compiled on a GPU, else interpreted."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import BACKEND, DEVICE, GPU, Case, assert_as_exact, check, naive_attention, random_case

from pikv_hf.kernels import dispatch, paged_decode_attention
from pikv_hf.kernels.page_codes import KINDS, Kind
from pikv_hf.kernels.partial_attention import partial_attention

pytestmark = pytest.mark.slow

HALF, SINGLE = torch.float16, torch.float32
#: Latents and rotary keys stored alike, and as a mix: rotary keys are often left as they are.
ALIKE: list[tuple[Kind, Kind]] = [(kind, kind) for kind in KINDS]
MIXED: list[tuple[Kind, Kind]] = [("int4", "none"), ("int2", "int8"), ("fp8", "int4"), ("none", "int4")]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def latent_case(
    kinds: tuple[Kind, Kind] = ("none", "none"),
    dtype: torch.dtype = SINGLE,
    *,
    groups: int = 5,
    heads: int = 1,
    dims: tuple[int, int] = (32, 16),
    lengths: Sequence[int] = (3, 0, 2),
    **named: Any,
) -> Case:
    """Return a decode step over latents and rotary keys."""
    return random_case(kinds, dtype, heads=heads, groups=groups, dims=dims, lengths=lengths, absorbed=True, **named)


@pytest.mark.parametrize("kinds", [*ALIKE, *MIXED], ids="-".join)
def test_kinds(kinds: tuple[Kind, Kind]) -> None:
    check(latent_case(kinds, SINGLE if kinds in ALIKE else HALF), absorbed=True)


@pytest.mark.skipif(not GPU, reason="Triton's interpreter computes bfloat16 dots wrongly; test_ptx.py mends it")
@pytest.mark.parametrize("kinds", [*ALIKE, *MIXED], ids="-".join)
def test_kinds_in_bfloat16(kinds: tuple[Kind, Kind]) -> None:
    check(latent_case(kinds, torch.bfloat16), absorbed=True)


@pytest.mark.parametrize(
    ("dims", "kinds"),
    [
        ((40, 8), ("none", "none")),
        ((40, 8), ("int4", "none")),
        ((33, 5), ("none", "none")),
        ((72, 24), ("int8", "int4")),
        ((512, 64), ("int4", "none")),
    ],
)
def test_widths(dims: tuple[int, int], kinds: tuple[Kind, Kind]) -> None:
    """Ranks that are no power of two, an odd one, and DeepSeek-V3's."""
    check(latent_case(kinds, HALF, dims=dims, groups=3, lengths=(2,)), absorbed=True)


@pytest.mark.parametrize("groups", [1, 3, 21, 128])
def test_heads(groups: int) -> None:
    """Rows of a program that no head fills, and more heads than a program takes."""
    check(latent_case(("int4", "none"), HALF, groups=groups, lengths=(2,)), absorbed=True)


def test_several_heads_of_latents() -> None:
    """As lanes of a pool have it, although models have one."""
    check(latent_case(("int8", "none"), heads=2, groups=3), absorbed=True)


# Pages below 16 are padded, several of them are a tile of 64, and one of 64 is read in four tiles of 16.
@pytest.mark.parametrize(("size", "tokens"), [(5, 16), (8, 64), (32, 16), (64, 16)])
@pytest.mark.parametrize("kinds", [("none", "none"), ("int2", "int4"), ("fp8", "int2")], ids="-".join)
def test_page_sizes(kinds: tuple[Kind, Kind], size: int, tokens: int) -> None:
    lengths = (4, 3) if size < 32 else (2,)
    check(latent_case(kinds, groups=2, size=size, lengths=lengths), tuning={"tokens": tokens}, absorbed=True)


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    counts=st.lists(st.integers(0, 8), min_size=4, max_size=6),
    splits=st.integers(1, 4),
    kind=st.sampled_from(["none", "int4"]),
    seed=st.integers(0, 9),
)
def test_rows_of_any_length(lengths: list[int], counts: list[int], splits: int, kind: Kind, seed: int) -> None:
    """One token, one page, ragged rows, empty rows, empty pages, and parts of a row without a page."""
    case = latent_case((kind, kind), groups=2, size=8, dims=(16, 16), lengths=lengths, counts=counts, seed=seed)
    check(case, tuning={"splits": splits}, absorbed=True)


def test_no_rows_and_no_pages() -> None:
    out, lse = paged_decode_attention(*latent_case(lengths=()).arguments(), absorbed=True, backend=BACKEND)
    assert (out.shape, lse.shape) == ((0, 5, 32), (0, 5))
    case = latent_case(lengths=(0, 0), counts=[])
    out, lse, page_lse = paged_decode_attention(*case.arguments(), page_lse=True, absorbed=True, backend=BACKEND)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert (page_lse == -torch.inf).all()


def test_low_rank_codecs_have_further_channels() -> None:
    check(latent_case(("int4", "int4"), HALF, latents=(5, 3), lengths=(2, 3)), absorbed=True)
    check(latent_case(size=8, latents=(20, 0), lengths=(3,)), absorbed=True)


@pytest.mark.parametrize("factor", [100.0, 0.01])
@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_float16_holds_decoded_tokens(kind: Kind, factor: float) -> None:
    check(latent_case((kind, "none"), HALF, factor=factor), absorbed=True)


def test_softcap() -> None:
    case = latent_case(("int8", "int4"), lengths=(2, 1))
    check(case, 0.5, absorbed=True)
    check(Case(case.query * 1000, *case.arguments()[1:]), 30.0, absorbed=True)


@pytest.mark.parametrize("tuning", [{"heads": 32, "num_warps": 4}, {"splits": 5}])
def test_launch_parameters_do_not_change_the_result(tuning: dict[str, int]) -> None:
    check(latent_case(groups=20, size=8, lengths=(4, 2)), tuning=tuning, absorbed=True)


def test_as_attention_with_the_latents_expanded() -> None:
    """Queries that have a projection absorbed attend as those before do to keys and values that are expanded."""
    case = latent_case(lengths=(3,), counts=[16] * 6)
    into_keys, into_values = torch.randn(2, 5, 8, 32, device=DEVICE).double()
    plain, rotary = torch.randn(5, 1, 8, device=DEVICE).double(), case.query[0, :, 32:].double()[:, None]
    absorbed = torch.cat([plain @ into_keys, rotary], dim=-1)[:, 0].float()
    query = Case(absorbed[None], *case.arguments()[1:])
    out, _ = paged_decode_attention(*query.arguments(), absorbed=True, backend=BACKEND)
    pages = case.table[0, :3].long()
    latents, turned = (pool.codes[0, pages].flatten(0, 1).double() for pool in (case.keys, case.values))
    keys = torch.cat([latents @ into_keys.transpose(1, 2), turned.expand(5, -1, -1)], dim=-1)
    values = latents @ into_values.transpose(1, 2)
    expected, _ = partial_attention(torch.cat([plain, rotary], dim=-1), keys, values, case.scale)
    brought_out = (out[0, :, None].double() @ into_values.transpose(1, 2))[:, 0]
    # Sums of 48 products for a score, which exponentials multiply, and of 32 for a result.
    largest = float(latents.abs().max() * absorbed.abs().max())
    atol = 2.0**-24 * 48 * largest * case.scale * float(values.abs().max() + brought_out.abs().max())
    torch.testing.assert_close(brought_out, expected[:, 0].double(), atol=8 * atol, rtol=2.0**-18)


def test_what_a_caller_can_get_wrong() -> None:
    query, keys, values, *rest = latent_case(("int4", "int4"), lengths=(2,)).arguments()

    def attend(query: torch.Tensor = query, **named: Any) -> None:
        pools = {"keys": keys, "values": values} | {n: named.pop(n) for n in ("keys", "values") if n in named}
        paged_decode_attention(query, *pools.values(), *rest, absorbed=True, backend=BACKEND, **named)

    with pytest.raises(ValueError, match=r"num_wraps.*num_warps.*heads, tokens"):
        attend(tuning={"num_wraps": 1})
    with pytest.raises(ValueError, match=r"\(1, 5, 32\) for 1 KV heads of 48"):
        attend(query[..., :32])
    with pytest.raises(TypeError, match="keys for values"):
        attend(query.repeat(1, 1, 2)[..., :64], values=keys)
    with pytest.raises(ValueError, match="unknown tuning"):
        paged_decode_attention(*random_case(lengths=(1,)).arguments(), backend=BACKEND, tuning={"heads": 16})


def test_launch_parameters_are_those_of_the_geometry() -> None:
    launcher = dispatch.load("absorbed_decode_attention", BACKEND)
    wide, narrow = latent_case(dims=(512, 64), lengths=(1,)), latent_case(lengths=(1,))

    def chosen(case: Case, groups: int, kibibytes: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
        pools = case.keys, case.values
        launch = launcher.launch_parameters(*pools, groups, dtype, kibibytes * 1024, {})
        return launch.heads, launch.stages

    # Hopper, Ampere, and a GPU for games.
    assert [chosen(wide, 128, memory) for memory in (227, 163, 99)] == [(64, 3), (32, 3), (16, 3)]
    assert [chosen(wide, groups, 227)[0] for groups in (1, 16, 20, 64)] == [16, 16, 32, 64]
    assert [chosen(wide, 128, memory, torch.float32) for memory in (227, 99)] == [(16, 3), (16, 2)]
    assert chosen(narrow, 128, 99) == (64, 3)
    assert launcher.tile_tokens(wide.keys, wide.values, torch.bfloat16) == 32
    assert launcher.tile_tokens(wide.keys, wide.values, torch.float32) == 16
    assert launcher.tile_tokens(narrow.keys, narrow.values, torch.bfloat16) == 64


def test_the_bound_is_tight_enough_to_see_an_error() -> None:
    """What is compared above differs by more than the bound as soon as one page is missing, or values are mixed up."""
    case = latent_case(lengths=(3,), dtype=HALF, counts=[16] * 4)
    yardstick = paged_decode_attention(*case.arguments(), absorbed=True, backend="torch")
    less = Case(*case.arguments()[:4], torch.full_like(case.lengths, 2), *case.arguments()[5:])
    turned = Case(case.query.roll(1, dims=2), *case.arguments()[1:])
    for wrong in (less, turned):
        actual = paged_decode_attention(*wrong.arguments(), absorbed=True, backend=BACKEND)
        with pytest.raises(AssertionError, match="torch's"):
            assert_as_exact(actual, yardstick, naive_attention(case, absorbed=True)[:2])
