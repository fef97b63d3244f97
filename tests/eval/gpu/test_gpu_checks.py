"""The checks of the kernels: they pass, their references are right, and a mistake of a kernel is red."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_gpu_check import CPU, KERNEL, PLATFORM, TORCH, checked, outcome, plan_of, tiny_case

from pikv_hf.eval.gpu import (
    check_attention,
    check_pages,
)
from pikv_hf.eval.gpu.check_attention import attention_plan, attention_plans
from pikv_hf.eval.gpu.check_lists import WIDTHS, list_outcomes, list_plans
from pikv_hf.eval.gpu.check_pages import page_plans
from pikv_hf.eval.gpu.checks import FLOOR, Check, Outcome, PlannedCheck, Platform, bound_of, max_difference, why_red
from pikv_hf.eval.gpu.geometry import scattered_table
from pikv_hf.eval.gpu.pools import encoded_pool, ragged_table
from pikv_hf.eval.gpu.references import attended, gathered
from pikv_hf.kernels.decode_pages import decode_pages
from pikv_hf.kernels.page_codes import KINDS, PageCodes

pytestmark = pytest.mark.slow

# The kernels, at sizes that the interpreter is quick with.

ATTENTION = [
    *(attention_plan("ragged rows", tiny_case(keys=kind, values=kind)) for kind in KINDS),
    attention_plan("half", tiny_case(dtype=torch.float16, keys="int8", values="int2")),
    attention_plan("latent", tiny_case(key_rank=16, value_rank=16, page_lse=True)),
    attention_plan("softcap", tiny_case(softcap=2.0)),
    *(
        attention_plan("latents", tiny_case(keys=keys, values=values, kv_heads=1, group=3, absorbed=True))
        for keys, values in (("none", "none"), ("int4", "none"), ("fp8", "int2"))
    ),
]
HALF, SINGLE = torch.float16, torch.float32
LISTS = [
    PlannedCheck(
        "page_lists",
        str(softcap),
        dtype,
        "-".join(kinds),
        functools.partial(list_outcomes, kinds, dtype, dim=16, page_size=8, softcap=softcap),
    )
    for kinds, dtype, softcap in ((WIDTHS, HALF, None), (("none", "fp8"), SINGLE, 2.0))
]
TINY_PAGES = {"dim": 16, "page_size": 8}
OTHERS = [
    *(
        PlannedCheck(
            "gather_pages",
            f"{keys}",
            HALF,
            kind,
            functools.partial(check_pages.gather_outcomes, kind, HALF, keys=keys, rank=rank, **TINY_PAGES),
        )
        for kind in KINDS
        for keys, rank in ((True, 4), (False, 0))
    ),
    *(
        PlannedCheck(
            "encode_pages",
            f"{keys}",
            SINGLE,
            kind,
            functools.partial(check_pages.encode_outcomes, kind, SINGLE, keys=keys, pages=8, **TINY_PAGES),
        )
        for kind in KINDS[1:]
        for keys in (True, False)
    ),
    *(
        PlannedCheck(
            "page_scores", bounds, HALF, "-", functools.partial(check_pages.score_outcomes, bounds, HALF, dim=16)
        )
        for bounds in check_pages.BOUNDS
    ),
    PlannedCheck(
        "merge_partials", "sinks", SINGLE, "-", functools.partial(check_pages.merge_outcomes, 3, sinks=True, dim=16)
    ),
    PlannedCheck("append_tokens", "", HALF, "-", functools.partial(check_pages.append_outcomes, HALF, dim=16)),
    PlannedCheck("append_newest", "", HALF, "-", functools.partial(check_pages.newest_outcomes, HALF, dim=16)),
]


@pytest.mark.parametrize(
    "plan", [*ATTENTION, *LISTS, *OTHERS], ids=lambda plan: f"{plan.operation}-{plan.kind}-{plan.case}"
)
def test_kernels_pass_their_checks(plan: PlannedCheck) -> None:
    checks = checked([plan], PLATFORM)
    assert checks
    assert [check for check in checks if not check.ok] == []
    assert all(check.max_error is not None and math.isfinite(check.max_error) for check in checks)


@pytest.mark.usefixtures("single_precision")
def test_torch_passes_every_check_of_a_gpu() -> None:
    """The checks are sound, in all dtypes, kinds and geometries that a GPU is asked for."""
    plans = [plan for plan in [*attention_plans(), *list_plans(), *page_plans()] if plan.case != "long rows"]
    assert [check for check in checked(plans, TORCH) if not check.ok] == []


def test_every_kernel_kind_and_dtype_is_checked() -> None:
    plans = [*attention_plans(), *list_plans(), *page_plans()]
    asked = {(plan.operation, plan.kind, plan.dtype) for plan in plans}
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for operation in ("paged_decode_attention", "absorbed_decode_attention", "gather_pages", "encode_pages"):
        kinds = KINDS[1:] if operation == "encode_pages" else KINDS
        assert {(operation, kind, dtype) for kind in kinds for dtype in dtypes} <= asked
    assert {("page_scores", "-", dtype) for dtype in dtypes} <= asked
    assert {(name, "-", dtype) for name in ("append_tokens", "append_newest") for dtype in dtypes} <= asked
    assert {kind for plan in list_plans() for kind in plan.kind.split("/")} == set(KINDS)
    assert ("merge_partials", "-", torch.float32) in asked
    latent = {plan.kind for plan in attention_plans() if plan.case == "latent"}
    assert latent == set(KINDS)


# References.


def dense_pool(seed: int = 0) -> tuple[torch.Tensor, PageCodes, PageCodes, Any]:
    generator = torch.Generator().manual_seed(seed)
    page_table = scattered_table(2, 3, CPU)
    page_table = dataclasses.replace(page_table, counts=torch.full((6,), 8, dtype=torch.int32))
    keys = encoded_pool("int8", 2, 16, 8, page_table, torch.float32, generator, keys=True)
    values = encoded_pool("none", 2, 24, 8, page_table, torch.float32, generator, keys=False)
    return torch.randn(2, 4, 16, generator=generator), keys, values, page_table


def test_reference_attention_is_torchs_on_full_pages() -> None:
    query, keys, values, page_table = dense_pool()
    decoded = [decode_pages(codes, torch.float32).double() for codes in (keys, values)]
    dense = [tokens[:, page_table.entries.long()].transpose(0, 1).flatten(2, 3) for tokens in decoded]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double().unsqueeze(2), *dense, scale=0.3, enable_gqa=True
    ).squeeze(2)
    out, lse, page_lse = attended(query, keys, values, page_table, 0.3, None, torch.float64)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(page_lse.logsumexp(2), lse)
    torch.testing.assert_close(gathered(keys, page_table, torch.float64), dense[0])


def test_reference_attention_sees_tokens_alone() -> None:
    """Slots without a token, pages that no row reads and stray table entries change nothing: all of them are poison."""
    generator = torch.Generator().manual_seed(1)
    page_table = ragged_table(4, 4, 8, generator)
    assert page_table.lengths.tolist() == [4, 0, 1, 3]
    assert page_table.entries[1].tolist() == [10**8, -7, 10**8, -7]
    assert page_table.entries[0, 0] == page_table.entries[3, 0]
    pools = [
        encoded_pool("none", 2, 8, 8, page_table, torch.float32, generator, keys=keys, rank=4) for keys in (True, False)
    ]
    assert all(pool.codes.isnan().any() and pool.latent.isnan().any() for pool in pools)
    query = torch.randn(4, 4, 12, generator=generator)
    out, lse, _ = attended(query, *pools, page_table, 0.3, 5.0, torch.float64)
    assert out.isfinite().all()
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    for row in (0, 2, 3):
        for head in range(4):
            seen = [(int(page), slot) for page in page_table.pages(row) for slot in range(int(page_table.counts[page]))]
            keys, values = (
                torch.stack([torch.cat([pool.codes[head // 2, p, s], pool.latent[head // 2, p, s]]) for p, s in seen])
                for pool in pools
            )
            logits = 5 * torch.tanh(keys.double() @ query[row, head].double() * 0.3 / 5)
            torch.testing.assert_close(out[row, head], torch.softmax(logits, 0) @ values.double())
            torch.testing.assert_close(lse[row, head], logits.logsumexp(0))


def test_reference_attention_to_latents_is_that_to_keys_with_rotary_parts() -> None:
    query, keys, values, page_table = dense_pool()
    latents = keys.map(lambda part: part[:1])
    rotary = values.map(lambda part: part[:1])
    query = torch.cat([query, torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(2))], dim=-1)
    parts = (
        decode_pages(codes, torch.float64)[:, page_table.entries.long()].transpose(0, 1).flatten(2, 3)
        for codes in (latents, rotary)
    )
    read, turned = parts
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double().unsqueeze(2), torch.cat([read, turned], dim=-1), read, scale=0.3, enable_gqa=True
    ).squeeze(2)
    out, lse, page_lse = attended(query, latents, rotary, page_table, 0.3, None, torch.float64, absorbed=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(page_lse.logsumexp(2), lse)


# Verdicts.


def test_bound_is_twice_torchs_error_and_a_floor() -> None:
    assert bound_of(outcome([], [1.0, -4.0], [1.5, -4.25])) == 2 * 0.5 + 4 * FLOOR
    assert bound_of(outcome([], [0.25], [0.25], unit=1.0)) == FLOOR
    assert bound_of(outcome([], [3.0, -math.inf], [3.0, -math.inf], floor=0.0)) == 0.0
    assert bound_of(outcome([], [0.0], [0.5], factor=1.02)) == 0.51


@pytest.mark.parametrize(
    ("result", "error"),
    [([1.0, -math.inf], 0.0), ([1.5, -math.inf], 0.5), ([math.nan, -math.inf], math.inf), ([1.0, 0.0], math.inf)],
)
def test_infinities_have_to_agree(result: list[float], error: float) -> None:
    assert max_difference(torch.tensor(result), torch.tensor([1.0, -math.inf])) == error
    assert max_difference(torch.tensor(result[:1]), torch.tensor([1.0, -math.inf])) == math.inf


def broken(platform: Platform) -> list[Outcome]:
    raise RuntimeError("no such instruction\nand a long listing")


def test_a_red_check_does_not_stop_the_others() -> None:
    plans = [plan_of([2.0]), plan_of([math.nan]), dataclasses.replace(plan_of([1.0]), run=broken), plan_of([1.0])]
    wrong, nan, raised, right = checked(plans, TORCH)
    assert (wrong.ok, wrong.max_error, wrong.bound) == (False, 1.0, FLOOR)
    assert (nan.ok, nan.max_error) == (False, None)
    assert "NaN" in nan.note
    assert (raised.ok, raised.note) == (False, "RuntimeError: no such instruction")
    assert right == Check("gather_pages", "case: out", "bfloat16", "int8", 0.0, FLOOR, True)


def test_a_red_kernel_has_no_figures() -> None:
    red = {("paged_decode_attention", "int8/int4"), ("page_scores", "-")}
    assert "int8/int4" in why_red(red, "paged_decode_attention", "int8")
    assert why_red(red, "paged_decode_attention", "int4")
    assert why_red(red, "paged_decode_attention", "-")
    assert why_red(red, "page_scores", "-")
    assert not why_red(red, "paged_decode_attention", "none")
    assert not why_red(red, "gather_pages", "int8")


def spoiled(change: Callable[..., Any]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return the torch operation, its inputs or results changed."""

    def call(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return change(KERNEL, *args, **kwargs)

    return call


MISTAKES: dict[str, Callable[..., Any]] = {
    "reads slots without a token": lambda kernel, q, k, v, table, lengths, counts, *rest, **options: kernel(
        q, k, v, table, lengths, torch.full_like(counts, k.page_size), *rest, **options
    ),
    "leaves the last page out": lambda kernel, q, k, v, table, lengths, *rest, **options: kernel(
        q, k, v, table, (lengths - 1).clamp_min(0), *rest, **options
    ),
    "ignores the soft cap": lambda kernel, *args, **options: kernel(*args[:7], None, **options),
    "rounds its query": lambda kernel, q, *rest, **options: kernel((q * 2**8).round() / 2**8, *rest, **options),
    "returns a log-sum-exp of base 2": lambda kernel, *args, **options: (
        (result := kernel(*args, **options))[0],
        result[1] / math.log(2),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("kind", ["none", "int4"])
def test_mistakes_of_a_kernel_are_red(mistake: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(keys=kind, values=kind, softcap=1.0)
    assert all(check.ok for check in checked([attention_plan("right", case)], TORCH))
    latents = dataclasses.replace(case, kv_heads=1, absorbed=True)
    assert all(check.ok for check in checked([attention_plan("right", latents)], TORCH))
    monkeypatch.setattr(check_attention, "paged_decode_attention", spoiled(MISTAKES[mistake]))
    for spoilt in (case, latents):
        assert not all(check.ok for check in checked([attention_plan("wrong", spoilt)], TORCH))
