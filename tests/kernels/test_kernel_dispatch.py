"""Which implementation of a kernel runs, and what is said where it cannot."""

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_cases import BACKEND, DEVICE, GPU, poisoned, random_case

from pikv_hf import kernels
from pikv_hf.kernels import dispatch

pytestmark = pytest.mark.slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_TRITON = "import sys; sys.modules['triton'] = None\n"


def python(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", dispatch.VARIABLE)}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], env=clean | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which Triton backend this process has used."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_taken", None)


@pytest.mark.usefixtures("fresh")
def test_argument_beats_environment_beats_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.choose(CPU) == "torch"
    assert dispatch.choose(CUDA) == "triton"
    assert dispatch.choose(CPU, "interpret") == "interpret"
    assert dispatch.choose(CUDA, "torch") == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "interpret")
    assert dispatch.choose(CPU) == "interpret"
    assert dispatch.choose(CPU, "torch") == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.choose(CUDA) == "torch"
    assert dispatch.choose(CUDA, "triton") == "triton"
    monkeypatch.setenv(dispatch.VARIABLE, "")
    assert dispatch.choose(CUDA) == "triton"


@pytest.mark.usefixtures("fresh")
def test_errors_say_what_was_asked_and_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'tritn'.*torch, numba, triton, interpret.*mean 'triton'"):
        dispatch.choose(CPU, "tritn")
    with pytest.raises(ValueError, match="'triton' needs tensors on cuda, not on cpu"):
        dispatch.choose(CPU, "triton")
    with pytest.raises(ValueError, match="'interpret' needs tensors on cpu, not on cuda"):
        dispatch.choose(CUDA, "interpret")
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match=f"unknown {dispatch.VARIABLE} 'cuda'"):
        dispatch.choose(CPU)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(ValueError, match=f"{dispatch.VARIABLE} 'triton' needs tensors on cuda"):
        dispatch.choose(CPU)


@pytest.mark.usefixtures("fresh")
def test_compiled_and_interpreted_kernels_exclude_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_taken", "interpret")
    assert dispatch.choose(CPU, "interpret") == "interpret"
    with pytest.raises(RuntimeError, match="'triton' after 'interpret'"):
        dispatch.choose(CUDA, "triton")
    assert dispatch.choose(CUDA) == "torch"
    monkeypatch.setattr(dispatch, "_taken", "triton")
    with pytest.raises(RuntimeError, match="'interpret' after 'triton'"):
        dispatch.choose(CPU, "interpret")
    monkeypatch.setattr(dispatch, "_taken", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="'triton' after 'interpret'"):
        dispatch.choose(CUDA, "triton")


@pytest.mark.usefixtures("fresh")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton_is_missing", lambda: "which is not installed")
    assert dispatch.choose(CUDA) == "torch"
    with pytest.raises(RuntimeError, match="'triton' needs the package triton"):
        dispatch.choose(CUDA, "triton")
    with pytest.raises(RuntimeError, match="'interpret' needs the package triton"):
        dispatch.choose(CPU, "interpret")


def test_a_triton_that_is_too_old_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.2.1"))
    assert dispatch._triton_is_missing.__wrapped__() == "3.3 or newer, not 3.2.1"
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.10.0+git1"))
    assert dispatch._triton_is_missing.__wrapped__() is None


def test_kernels_import_and_run_without_triton_and_transformers() -> None:
    blocked = f"{NO_TRITON}sys.modules['transformers'] = None\n"
    run = "pages = k.encode_pages(torch.randn(1, 2, 8, 16), 'int4', keys=True)\nprint(pages.codes.shape)\n"
    why = "try: k.encode_pages(torch.zeros(1, 2, 8, 16), 'int4', keys=True, backend='interpret')\n"
    told = python(f"{blocked}import torch, pikv_hf.kernels as k\n{run}{why}except RuntimeError as error: print(error)")
    assert told.splitlines()[0] == "torch.Size([1, 2, 4, 16])"
    assert "'interpret' needs the package triton, which is not installed" in told.splitlines()[1]


def test_importing_kernels_neither_imports_triton_nor_touches_cuda() -> None:
    code = "import sys, torch, pikv_hf.kernels; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert python(code) == "False False"


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="beside a GPU kernels are compiled; the interpreter of Triton 3.6 fails with NumPy 2.4")
def test_the_interpreter_works_in_either_order_of_imports() -> None:
    merge = "print(k.merge_partials(torch.ones(2, 1, 1, 4), torch.zeros(2, 1, 1), backend='interpret')[0].tolist())"
    for first in ("", "import triton, triton.language\n"):
        assert python(f"{first}import torch, pikv_hf.kernels as k\n{merge}") == "[[[1.0, 1.0, 1.0, 1.0]]]"


def operations() -> dict[str, Callable[[str], Any]]:
    """Return a call of every operation that has a Triton version."""
    case = random_case(lengths=(1,))
    table, lengths, counts = case.table, case.lengths, case.counts
    pool = torch.zeros(1, 2, 4, 8, device=DEVICE)
    summary = torch.zeros(2, len(counts), 32, device=DEVICE)
    page = torch.zeros(2, 3, 4, 32, device=DEVICE)
    latents = random_case(lengths=(1,), heads=1, absorbed=True).arguments()
    none = poisoned(2, 16, 32, "none", counts.cpu(), torch.float32, keys=True)
    positions, newest = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE), torch.ones(1, 1, 1, 8, device=DEVICE)
    slots, tokens = torch.arange(2, device=DEVICE), torch.ones(1, 2, 8, device=DEVICE)
    return {
        "paged_decode_attention": lambda how: kernels.paged_decode_attention(*case.arguments(), backend=how),
        "absorbed_decode_attention": lambda how: kernels.paged_decode_attention(*latents, absorbed=True, backend=how),
        "gather_pages": lambda how: kernels.gather_pages(none, table, lengths, counts, torch.float32, backend=how),
        "page_scores": lambda how: kernels.page_scores(case.query, summary, None, table, lengths, backend=how),
        "merge_partials": lambda how: kernels.merge_partials(pool, pool[..., 0], backend=how),
        "append_tokens": lambda how: kernels.append_tokens(pool, slots, tokens, backend=how),
        "append_newest": lambda how: kernels.append_newest(
            pool, pool, positions, slots[:1], 1, newest, newest, 5, backend=how
        ),
        "encode_pages": lambda how: kernels.encode_pages(page, "int4", keys=True, backend=how),
    }


@pytest.mark.parametrize(
    "name",
    [
        "append_newest",
        "append_tokens",
        "gather_pages",
        "merge_partials",
        "page_scores",
        "paged_decode_attention",
        "absorbed_decode_attention",
        "encode_pages",
    ],
)
def test_the_backend_decides_which_code_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = operations()[name]
    call(BACKEND)
    module = importlib.import_module(f"pikv_hf.kernels.triton_{name}")

    def caught(*_: object, **__: object) -> None:
        raise LookupError(name)

    monkeypatch.setattr(module, name, caught)
    with pytest.raises(LookupError, match=name):
        call(BACKEND)
    call("torch")


def test_a_pool_on_the_wrong_device_is_not_interpreted() -> None:
    case = random_case(lengths=(1,))
    with pytest.raises(ValueError, match="needs tensors on"):
        kernels.paged_decode_attention(*case.arguments(), backend="interpret" if GPU else "triton")


@pytest.mark.parametrize(
    ("dims", "expected"), [((128, 64), "triton"), ((), "triton"), ((128, 8), "torch"), ((17,), "torch")]
)
def test_channels_that_do_not_pair_up_are_left_to_torch(
    dims: tuple[int, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_taken", None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PIKV_KERNELS", raising=False)
    assert dispatch.choose(torch.device("cuda", 0), None, dims) == expected
