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
from typing import Any

import pytest
import torch

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


def decode(
    kinds: tuple[str, str] = ("int4", "int4"),
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    size: int = 32,
    latents: tuple[int, int] = (0, 0),
    softcap: float | None = None,
    page_lse: bool = False,
) -> None:
    """Launch the decode step on a table long enough to be cut, so that its merge is launched too."""
    from pikv_hf.kernels.encode_pages import encode_pages
    from pikv_hf.kernels.page_codes import PageCodes

    launcher = importlib.import_module("pikv_hf.kernels.triton_paged_decode_attention")
    pools = []
    for keys, kind, dim, latent in zip((True, False), kinds, dims, latents, strict=True):
        pool: PageCodes = encode_pages(
            torch.zeros(HEADS, PAGES, size, dim, dtype=dtype), kind, keys=keys, backend="torch"
        )
        parts = (pool.codes, pool.spread, pool.floor, pool.outliers, pool.fine)
        rest = torch.zeros(HEADS, PAGES, size, latent, dtype=dtype) if latent else None
        pools.append(PageCodes(pool.kind, size, *parts, rest))
    query = torch.zeros(2, HEADS * GROUPS, dims[0] + latents[0], dtype=dtype)
    table, lengths, counts = (torch.zeros(shape, dtype=torch.int32) for shape in ((2, 64), (2,), (PAGES,)))
    launcher.paged_decode_attention(query, *pools, table, lengths, counts, 0.1, softcap, page_lse, {"splits": 4})


def others() -> None:
    """Launch the other kernels."""
    from pikv_hf.kernels.encode_pages import encode_pages

    gather, scores, append, encode = (
        getattr(importlib.import_module(f"pikv_hf.kernels.triton_{name}"), name)
        for name in ("gather_pages", "page_scores", "append_tokens", "encode_pages")
    )
    tokens = torch.zeros(HEADS, PAGES, 32, 128, dtype=torch.bfloat16)
    table, lengths, counts = (torch.zeros(shape, dtype=torch.int32) for shape in ((2, 64), (2,), (PAGES,)))
    for kind, keys in (("int4", True), ("int8", False), ("fp8", True)):
        encode(tokens, kind, keys=keys)
        gather(encode_pages(tokens, kind, keys=keys, backend="torch"), table, lengths, counts, torch.bfloat16)
    query, summary = torch.zeros(2, HEADS * GROUPS, 128, dtype=torch.bfloat16), tokens[:, :, 0].half().contiguous()
    scores(query, summary, torch.zeros(summary.shape, dtype=torch.uint8), table, lengths)
    scores(query.float(), summary.float(), summary.float(), table, lengths)
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
            found = compiled(kernel, values, options)
            key = f"{kernel.__name__} {found['signature']}"
            if key not in launched:
                launched.add(key)
                print(json.dumps({"kernel": kernel.__name__, "case": label} | found), flush=True)

        return run

    JITFunction.__getitem__ = launch
    launcher = importlib.import_module("pikv_hf.kernels.triton_paged_decode_attention")
    launcher._takes_ptx = lambda query: query.dtype != torch.float32
    for label, case in DECODE.items():  # noqa: B007
        decode(**case)
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
    names = {"decode_kernel", "_merge_kernel", "_gather_kernel", "_scores_kernel", "_append_kernel"}
    names |= {"_encode_keys_kernel", "_encode_values_kernel", "_encode_fp8_kernel"}
    assert {line["kernel"] for line in lines} == names
    assert {line["case"] for line in lines if line["kernel"] == "decode_kernel"} == set(DECODE)
    assert all(line["cubin"] > 0 for line in lines)


def test_kernels_fit_on_a_multiprocessor(lines: list[dict[str, Any]]) -> None:
    """Four programs at least of the decode step must find room, or its loads leave the memory idle (but in float32)."""
    for line in lines:
        assert line["shared_bytes"] <= 48 * 1024, line
        if line["kernel"] == "decode_kernel" and "registers" in line and "float32" not in line["case"]:
            assert 4 * line["registers"] * 32 * line["num_warps"] <= 64 * 1024, line
            assert 4 * line["shared_bytes"] <= 228 * 1024, line


if __name__ == "__main__":
    compile_all()
