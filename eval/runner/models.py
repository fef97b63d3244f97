"""Load a model and its tokenizer by what the user calls them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pikv_hf.eval.errors import InputError, user_input
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
        `reference` for the bundled model, a folder, or a name on the Hub.
    dtype : str, optional
        One of `DTYPES`; by default the one the model was saved in.
    device : str, optional
        Such as `cpu`, `cuda:0`, or `auto` (accelerate spreads the layers over all GPUs); by default a GPU if any.
    attn_implementation : str, optional
        Of transformers; by default the model's own choice.

    Raises
    ------
    InputError
        If there is no such folder, model or device.
    """
    spread = device == "auto"
    target = torch.device("cpu") if spread else _device(device)
    if name == REFERENCE:
        with user_input("cannot load the bundled reference model"):
            model, tokenizer = load_reference_model(_dtype(dtype) or torch.float32, attn_implementation or "sdpa")
        return model.to(target), tokenizer
    if _looks_like_path(name):
        if not Path(name).expanduser().is_dir():
            raise InputError(f"cannot load --model {name}: no such folder")
        folder = str(Path(name).expanduser())
    else:
        folder = name
    given = {"device_map": "auto"} if spread else {}
    if attn_implementation is not None:
        given["attn_implementation"] = attn_implementation
    with user_input(f"cannot load --model {name}"):
        # The config comes first: of the three, its absence gives the clearest message.
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=_dtype(dtype) or "auto", **given)
    return (model.eval() if spread else model.eval().to(target)), tokenizer


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
        torch.empty(0, device=device)
    return device


def _looks_like_path(name: str) -> bool:
    """Return whether a model name cannot be one of the Hub's, which have the form `name` or `owner/name`."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
