"""The PTX that unpacks codes, followed instruction by instruction: no GPU is needed to know what it computes."""

import types
from typing import Any

import numpy as np
import pytest
import torch
from triton_cases import BACKEND, GPU, check, random_case

from pikv_hf.kernels import dispatch
from pikv_hf.kernels.page_codes import BITS, Kind

pytestmark = pytest.mark.slow

unpacking = dispatch.load("unpack", BACKEND)
CENTRES = dispatch.load("pool", BACKEND).CENTRES

Registers = dict[str, torch.Tensor]


def follow(ptx: str, operands: Registers) -> Registers:
    """Execute instructions on registers, int64 tensors of 32-bit numbers, one element per thread."""
    registers = dict(operands)
    threads = len(operands["$2"])

    def value(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.full((threads,), int(name, 0))

    for line in ptx.strip().strip("{}").strip().splitlines():
        if line.startswith(".reg"):
            continue
        instruction, _, rest = line.rstrip(";").partition(" ")
        target, *names = (name.strip() for name in rest.split(","))
        registers[target] = EXECUTE[instruction](*(value(name) for name in names))
    return registers


def permute(a: torch.Tensor, b: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """Prmt: byte n of the result is byte number `selector nibble n` of a (0..3) and b (4..7)."""
    both = a | b << 32
    picked = [both >> 8 * ((selector >> 4 * n) & 7) & 255 for n in range(4)]
    assert ((selector & 0x8888) == 0).all()
    return picked[0] | picked[1] << 8 | picked[2] << 16 | picked[3] << 24


def logic(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Lop3: bit 4 * a + 2 * b + c of the table, for every bit of the operands."""
    result = torch.zeros_like(a)
    for bit in range(32):
        index = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        result |= (table >> index & 1) << bit
    return result


def halves(register: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Read both halves of registers, low first, as float64."""
    bits = torch.stack([register & 0xFFFF, register >> 16], dim=-1)
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(dtype).double()


def fused(dtype: torch.dtype) -> Any:
    def run(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        exact = halves(a, dtype) * halves(b, dtype) + halves(c, dtype)
        bits = exact.to(dtype).view(torch.int16).long() & 0xFFFF
        return bits[:, 0] | bits[:, 1] << 16

    return run


EXECUTE: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "prmt.b32": permute,
    "lop3.b32": logic,
    "fma.rn.bf16x2": fused(torch.bfloat16),
    "fma.rn.f16x2": fused(torch.float16),
}


def words() -> torch.Tensor:
    """Return registers of four different bytes, each of which takes all values."""
    n = torch.arange(256)
    return n | (255 - n) << 8 | (n * 7 + 3 & 255) << 16 | (n ^ 0x5A) << 24


def check_halves(registers: Registers, dtype: torch.dtype, expected: torch.Tensor) -> None:
    """Compare with what the four bytes stand for, `(256, 4)`: bytes 0 and 2 are even channels, 1 and 3 odd ones."""
    assert torch.equal(halves(registers["$0"], dtype), expected[:, 0::2])
    assert torch.equal(halves(registers["$1"], dtype), expected[:, 1::2])


def byte_values() -> torch.Tensor:
    return torch.stack([words() >> 8 * n & 255 for n in range(4)], dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4", "int2"])
def test_integers(kind: Kind, dtype: torch.dtype) -> None:
    """In bfloat16 128 is added to codes, in float16 the centre subtracted."""
    narrow = dtype == torch.bfloat16
    ptx = unpacking.INTEGERS_BFLOAT16 if narrow else unpacking.INTEGERS_FLOAT16
    added = 128 if narrow else -CENTRES[kind]
    for shift in range(0, 8, BITS[kind]):
        operands = {"$3": shift, "$5": 0x01010101 * (2 ** BITS[kind] - 1), "$7": 0x10001 * (0xE400 + CENTRES[kind])}
        registers = follow(ptx, {name: torch.full((256,), n) for name, n in operands.items()} | {"$2": words()})
        codes = byte_values() >> shift & 2 ** BITS[kind] - 1
        check_halves(registers, dtype, (codes + added).double())


def test_bytes() -> None:
    expected = (byte_values() - CENTRES["int8"]).double()
    check_halves(follow(unpacking.BYTES_BFLOAT16, {"$2": words()}), torch.bfloat16, expected)
    operands = {"$3": 0, "$5": 0xFFFFFFFF, "$7": 0x10001 * (0xE400 + CENTRES["int8"])}
    registers = {name: torch.full((256,), n) for name, n in operands.items()} | {"$2": words()}
    check_halves(follow(unpacking.INTEGERS_FLOAT16, registers), torch.float16, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8(dtype: torch.dtype) -> None:
    ptx = unpacking.FP8_BFLOAT16 if dtype == torch.bfloat16 else unpacking.FP8_FLOAT16
    numbers = byte_values().to(torch.uint8).view(torch.float8_e4m3fn).double()
    # What is NaN in e4m3 may lie in slots without a token, and must stay finite to weigh nothing.
    numbers = numbers.where(numbers.isfinite(), torch.where(byte_values() < 128, 480.0, -480.0).double())
    check_halves(follow(ptx, {"$2": words()}), dtype, numbers)


def interpret_ptx(asm: str, handles: list[Any], result_types: list[Any]) -> Any:
    """Stand in for the interpreter's missing inline assembly. Elements are packed in pairs; here each has its own."""
    from triton.runtime.interpreter import TensorHandle

    shape = handles[0].data.shape
    if asm.startswith("ex2.approx"):
        results = [np.exp2(handles[0].data)]
    else:
        # One register of words, and two of each number that is the same for all.
        names = ("$2", "$3", "$5", "$7")
        operands = {n: torch.from_numpy(h.data.astype(np.int64).ravel()) for n, h in zip(names, handles, strict=False)}
        operands["$2"] &= 0xFFFF
        registers = follow(asm, operands)
        results = [(registers[name] & 0xFFFF).numpy().astype(np.uint16).view(np.int16) for name in ("$0", "$1")]
    outputs = [TensorHandle(data.reshape(shape), kind.scalar) for data, kind in zip(results, result_types, strict=True)]
    return types.SimpleNamespace(get_result=outputs.__getitem__)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the interpreter follow PTX, and multiply and round bfloat16; return a list of the PTX that is followed."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def asm(_: Any, text: str, constraints: str, handles: list[Any], results: list[Any], pure: bool, pack: int) -> Any:
        calls.append(text)
        return interpret_ptx(text, handles, results)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    def widened(handle: Any) -> Any:
        # The interpreter keeps bfloat16 as its bits, and multiplies these.
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast(self: Any, source: Any, target: Any) -> Any:
        # It also cuts off what bfloat16 cannot hold, where GPUs round.
        if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(source.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return TensorHandle(rounded, tl.bfloat16)
        return plain_cast(self, source, target)

    calls: list[str] = []
    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", asm)
    for operation in ("paged_decode_attention", "absorbed_decode_attention"):
        monkeypatch.setattr(dispatch.load(operation, BACKEND), "takes_ptx", lambda query: True)
    return calls


followed = pytest.mark.skipif(GPU, reason="a GPU runs the PTX itself, in test_triton_decode.py")


@followed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kinds", "size"),
    [
        (("int8", "int8"), 16),
        (("int4", "int4"), 32),
        (("int4", "int2"), 5),
        (("int2", "int4"), 32),
        (("int2", "int2"), 64),
        (("fp8", "fp8"), 16),
        (("none", "int4"), 32),
    ],
)
def test_decode_as_a_gpu_would(kinds: tuple[Kind, Kind], size: int, dtype: torch.dtype, as_on_a_gpu: list[str]) -> None:
    check(random_case(kinds, dtype, heads=1, groups=8, size=size, lengths=(2, 3)))
    assert any("prmt" in text for text in as_on_a_gpu)
    assert any("ex2" in text for text in as_on_a_gpu)


@followed
@pytest.mark.parametrize(
    ("kinds", "size", "dtype"),
    [
        (("none", "none"), 16, torch.bfloat16),
        (("int8", "none"), 16, torch.bfloat16),
        (("int4", "int8"), 32, torch.bfloat16),
        (("int2", "int2"), 5, torch.bfloat16),
        (("fp8", "int4"), 32, torch.bfloat16),
        (("int4", "int8"), 16, torch.float16),
        (("fp8", "int2"), 5, torch.float16),
    ],
)
def test_latents_as_a_gpu_would(
    kinds: tuple[Kind, Kind], size: int, dtype: torch.dtype, as_on_a_gpu: list[str]
) -> None:
    check(random_case(kinds, dtype, heads=1, groups=5, size=size, lengths=(2, 3), absorbed=True), absorbed=True)
    assert any("prmt" in text for text in as_on_a_gpu) or kinds == ("none", "none")
    assert any("ex2" in text for text in as_on_a_gpu)
