"""The Triton kernels go through Triton's compiler and NVIDIA's assembler for a GPU that need not be there.

Run as a program, this file compiles them for compute capability 9.0, as their launchers would, and prints what they
take of a multiprocessor, one line of JSON per kernel.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

if TYPE_CHECKING:
    from pikv_hf.kernels.page_codes import Kind, PageCodes

pytestmark = pytest.mark.slow

HEADS, GROUPS, PAGES = 4, 8, 6
DECODE: dict[str, dict[str, Any]] = {
    "int4": {},
    "none": {"kinds": ("none", "none")},
    "int8": {"kinds": ("int8", "int8")},
    "fp8 half": {"kinds": ("fp8", "fp8"), "dtype": torch.float16},
    "int2 int4 64": {"kinds": ("int2", "int4"), "dims": (64, 64)},
    "int4 192 128": {"dims": (192, 128)},
    "int4 float32": {"dtype": torch.float32, "dims": (64, 64)},
    "int4 odd page, latent, softcap, page_lse": {"size": 5, "latents": (16, 8), "softcap": 30.0, "page_lse": True},
}
#: Of latents: sizes of DeepSeek-V3 but for what is named.
LATENTS: dict[str, dict[str, Any]] = {
    "none": {},
    "none 16 heads": {"groups": 16},
    "none float32": {"dtype": torch.float32, "groups": 16, "dims": (256, 32)},
    "int4 int8": {"kinds": ("int4", "int8")},
    "none 40 8, odd page, latent, softcap, page_lse": {
        "dims": (40, 8), "groups": 3, "size": 5, "latents": (5, 3), "softcap": 30.0, "page_lse": True,
    },
}  # fmt: skip
#: Lists of pages of several pools, by their kinds.
LISTS: dict[str, dict[str, Any]] = {
    "plain": {"kinds": [("none", "none")]},
    "int4": {"kinds": [("none", "none"), ("int4", "int4")]},
    "widths": {"kinds": [("none", "none"), ("int8", "int8"), ("int4", "int4"), ("int2", "int2")]},
    "fp8 half": {"kinds": [("none", "none"), ("fp8", "fp8")], "dtype": torch.float16},
    "float32": {"kinds": [("none", "none"), ("int8", "int8")], "dtype": torch.float32, "dims": (64, 64)},
    "latent, softcap, page_lse": {"kinds": [("int4", "int4")], "latents": (16, 8), "softcap": 30.0, "page_lse": True},
}
#: Shared memory that a program may have on compute capability 9.0.
MOST_SHARED = 227 * 1024


def pool_of(
    kinds: tuple[str, str],
    dims: tuple[int, int],
    dtype: torch.dtype,
    size: int = 32,
    latents: tuple[int, int] = (0, 0),
    heads: int = HEADS,
) -> "list[PageCodes]":
    """Return the keys and the values of a pool."""
    from pikv_hf.kernels.encode_pages import encode_pages
    from pikv_hf.kernels.page_codes import PageCodes

    pools = []
    for keys, kind, dim, latent in zip((True, False), kinds, dims, latents, strict=True):
        tokens = torch.zeros(heads, PAGES, size, dim, dtype=dtype)
        pool = encode_pages(tokens, cast("Kind", kind), keys=keys, backend="torch")
        parts = (pool.codes, pool.spread, pool.floor, pool.outliers, pool.fine)
        rest = torch.zeros(heads, PAGES, size, latent, dtype=dtype) if latent else None
        pools.append(PageCodes(pool.kind, size, *parts, rest))
    return pools


def decode_lists(
    kinds: list[tuple[str, str]],
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    latents: tuple[int, int] = (0, 0),
    softcap: float | None = None,
    page_lse: bool = False,
) -> None:
    """Launch the decode step over lists of pages of several pools."""
    import numpy as np

    from pikv_hf.kernels.page_lists import ListedPool, PageLists

    counts, growing = np.ones(PAGES, dtype=np.int16), np.zeros(1, dtype=np.int64)
    pools = [ListedPool(*pool_of(each, dims, dtype, latents=latents), counts, growing) for each in kinds]
    entries = np.array([number << 32 | page for number in range(len(pools)) for page in range(PAGES)], dtype=np.int64)
    lists = PageLists(pools, entries, np.array([0, len(entries)]), 1, "triton")
    query = torch.zeros(1, HEADS * GROUPS, lists.query_dim, dtype=dtype)
    lists.attend(query, 0.1, softcap, torch.zeros(1, HEADS * GROUPS, PAGES) if page_lse else None)


def decode(
    kinds: tuple[str, str] = ("int4", "int4"),
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    size: int = 32,
    latents: tuple[int, int] = (0, 0),
    softcap: float | None = None,
    page_lse: bool = False,
    *,
    heads: int = HEADS,
    groups: int = GROUPS,
    absorbed: bool = False,
) -> None:
    """Launch the decode step on a table long enough to be cut, so that its merge is launched too."""
    operation = "absorbed_decode_attention" if absorbed else "paged_decode_attention"
    launcher = importlib.import_module(f"pikv_hf.kernels.triton_{operation}")
    pools = pool_of(kinds, dims, dtype, size, latents, heads)
    width = pools[0].width + (pools[1].width if absorbed else 0)
    query = torch.zeros(2, heads * groups, width, dtype=dtype)
    table, lengths, counts = (torch.zeros(shape, dtype=torch.int32) for shape in ((2, 64), (2,), (PAGES,)))
    launch = getattr(launcher, operation)
    launch(query, *pools, table, lengths, counts, 0.1, softcap, page_lse, {"splits": 4})


def others() -> None:
    """Launch the other kernels."""
    from pikv_hf.kernels.encode_pages import encode_pages

    gather, scores, append, newest, encode = (
        getattr(importlib.import_module(f"pikv_hf.kernels.triton_{name}"), name)
        for name in ("gather_pages", "page_scores", "append_tokens", "append_newest", "encode_pages")
    )
    tokens = torch.zeros(HEADS, PAGES, 32, 128, dtype=torch.bfloat16)
    table, lengths, counts = (torch.zeros(shape, dtype=torch.int32) for shape in ((2, 64), (2,), (PAGES,)))
    for kind, keys in (("int4", True), ("int8", False), ("fp8", True)):
        encode(tokens, kind, keys=keys)
        gather(encode_pages(tokens, kind, keys=keys, backend="torch"), table, lengths, counts, torch.bfloat16)
    query, summary = torch.zeros(2, HEADS * GROUPS, 128, dtype=torch.bfloat16), tokens[:, :, 0].half().contiguous()
    scores(query, summary, torch.zeros(summary.shape, dtype=torch.uint8), table, lengths)
    scores(query.float(), summary.float(), summary.float(), table, lengths)
    token, positions = torch.zeros(2, HEADS, 1, 128, dtype=torch.bfloat16), torch.zeros(PAGES, 32, dtype=torch.int32)
    newest(tokens, tokens, positions, torch.zeros(2, dtype=torch.int64), 3, token, token, 5)
    append(tokens, torch.zeros(8, dtype=torch.int64), torch.zeros(HEADS, 8, 128, dtype=torch.bfloat16))


def compile_all() -> None:
    """Compile what the launchers launch, instead of running it."""
    from triton.runtime.jit import JITFunction

    launched: set[str] = set()
    label = ""

    def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **named: Any) -> None:
            assert all(extent > 0 for extent in grid)
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            given = dict(zip(kernel.arg_names, args, strict=False)) | named
            assert set(given) == set(kernel.arg_names)
            values = {name: given[name] for name in kernel.arg_names}
            if kernel.__name__ in ("listed_kernel", "_append_newest_kernel"):
                # What changes from one step to the next: nothing is compiled anew for it.
                changing = {p.name for p in kernel.params if p.do_not_specialize}
                assert changing >= {"grown", "rows", "parts"} or changing >= {"offset", "position"}
            found = compiled(kernel, values, options)
            key = f"{kernel.__name__} {found['signature']}"
            if key not in launched:
                launched.add(key)
                print(json.dumps({"kernel": kernel.__name__, "case": label} | found), flush=True)

        return run

    JITFunction.__getitem__ = launch
    modules = ("paged_decode_attention", "absorbed_decode_attention", "page_lists")
    plain, absorbed, lists = (importlib.import_module(f"pikv_hf.kernels.triton_{name}") for name in modules)
    plain.takes_ptx = absorbed.takes_ptx = lists.takes_ptx = lambda query: query.dtype != torch.float32
    absorbed.shared_bytes = lambda device: MOST_SHARED
    for label, case in DECODE.items():  # noqa: B007
        decode(**case)
    for label, case in LISTS.items():  # noqa: B007
        decode_lists(**case)
    for label, case in LATENTS.items():  # noqa: B007
        decode(**{"dims": (512, 64), "kinds": ("none", "none"), "heads": 1, "groups": 128} | case, absorbed=True)
    label = ""
    others()


def compiled(kernel: Any, values: dict[str, Any], options: dict[str, int]) -> dict[str, Any]:
    """Compile a kernel for the types and constants of some arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constant = {p.name for p in kernel.params if p.is_constexpr} | {n for n, value in values.items() if value is None}
    signature = {name: "constexpr" if name in constant else type_name(value) for name, value in values.items()}
    aligned = {
        (kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] == "*"
    }
    source = ASTSource(kernel, signature, {name: values[name] for name in constant}, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "signature": str((sorted(signature.items()), sorted((n, str(values[n])) for n in constant))),
        "cubin": len(binary.asm["cubin"]),
        "shared_bytes": binary.metadata.shared,
        "products": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", binary.asm["ptx"]))),
        **options,
        **usage(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", binary.asm["cubin"]),
    }


def type_name(value: Any) -> str:
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8"}
    names |= {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
    if isinstance(value, torch.Tensor):
        return f"*{names[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def usage(tool: Path, cubin: bytes) -> dict[str, int]:
    """Return registers per thread and bytes of stack, spilt ones mostly, if there is a tool to tell."""
    if not tool.exists():
        return {}
    Path("kernel.cubin").write_bytes(cubin)
    told = subprocess.run([tool, "-res-usage", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton.backends.nvidia", reason="Triton without its compiler for NVIDIA GPUs")
    folder = tmp_path_factory.mktemp("compiled")
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PIKV_KERNELS")}
    result = subprocess.run(
        [sys.executable, "-P", __file__],
        cwd=folder,
        env=clean | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads(line) for line in result.stdout.splitlines()]
    for line in found:
        print({name: value for name, value in line.items() if name != "signature"})
    return found


def test_every_kernel_compiles(lines: list[dict[str, Any]]) -> None:
    names = {
        "decode_kernel",
        "listed_kernel",
        "absorbed_kernel",
        "_merge_kernel",
        "_gather_kernel",
        "_scores_kernel",
        "_append_kernel",
        "_append_newest_kernel",
    }
    names |= {"_encode_keys_kernel", "_encode_values_kernel", "_encode_fp8_kernel"}
    assert {line["kernel"] for line in lines} == names
    for kernel, cases in (("decode_kernel", DECODE), ("listed_kernel", LISTS), ("absorbed_kernel", LATENTS)):
        assert {line["case"] for line in lines if line["kernel"] == kernel} == set(cases)
    assert all(line["cubin"] > 0 for line in lines)


def test_kernels_fit_on_a_multiprocessor(lines: list[dict[str, Any]]) -> None:
    """Four programs at least of the decode step must find room, or its loads leave the memory idle (but in float32)."""
    for line in lines:
        if line["kernel"] == "absorbed_kernel":
            continue
        assert line["shared_bytes"] <= 48 * 1024, line
        if (
            line["kernel"] in ("decode_kernel", "listed_kernel")
            and "registers" in line
            and "float32" not in line["case"]
        ):
            assert 4 * line["registers"] * 32 * line["num_warps"] <= 64 * 1024, line
            assert 4 * line["shared_bytes"] <= 228 * 1024, line


def test_latents_fit_on_a_multiprocessor(lines: list[dict[str, Any]]) -> None:
    """One program at least; without codes to be decoded its registers hold nearly all."""
    found = {line["case"]: line for line in lines if line["kernel"] == "absorbed_kernel"}
    for case, line in found.items():
        assert line["shared_bytes"] <= MOST_SHARED, line
        assert line.get("registers", 0) * 32 * line["num_warps"] <= 64 * 1024, line
        # A few words are spilt before and after the loop.
        assert line.get("stack_bytes", 0) <= (64 if case.startswith("none") else 1024), line
    # Sixteen heads leave room for a second program, and other GPUs have no more shared memory than this.
    assert found["none 16 heads"]["shared_bytes"] <= 99 * 1024


def test_tensor_cores_multiply_latents(lines: list[dict[str, Any]]) -> None:
    """By what Hopper has for 64 rows of queries, where there are so many heads."""
    for line in lines:
        if line["kernel"] == "absorbed_kernel" and "float32" not in line["case"]:
            wide = not any(few in line["case"] for few in ("16 heads", "40 8"))
            assert ("wgmma.mma_async" if wide else "mma.sync") in line["products"], line


if __name__ == "__main__":
    compile_all()
