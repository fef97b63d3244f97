"""Load the bundled reference model without a network: a small Qwen3-MoE that answers retrieval questions."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

CHECKPOINT = "model.safetensors"
DIGESTS = "SHA256SUMS"


def reference_model_path() -> Path:
    """Folder of the bundled checkpoint, tokenizer and model card."""
    return Path(__file__).parents[1] / "reference_model"


def load_reference_model(
    dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the bundled model in evaluation mode, on the CPU, and its tokenizer.

    Parameters
    ----------
    dtype : torch.dtype
        Parameter dtype; the checkpoint is float32.
    attn_implementation : str
        Any attention implementation that transformers knows.

    Raises
    ------
    FileNotFoundError
        If the package was installed without its checkpoint.
    ValueError
        If the checkpoint's SHA-256 is not the recorded one.
    """
    path = reference_model_path()
    verify_digest(path)
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation, local_files_only=True
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Switch transformers' progress bars off for a while; 46 small tensors need none."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def verify_digest(folder: Path) -> None:
    """Compare the checkpoint in ``folder`` with its recorded SHA-256.

    Raises
    ------
    FileNotFoundError
        If the checkpoint or its digest is missing.
    ValueError
        If they do not belong together; the message names both digests.
    """
    recorded = (folder / DIGESTS).read_text().split()[0]
    found = _sha256(folder / CHECKPOINT)
    if found != recorded:
        raise ValueError(f"{folder / CHECKPOINT} has SHA-256 {found}, but {DIGESTS} records {recorded}")


def write_digest(folder: Path) -> None:
    """Record the SHA-256 of the checkpoint in ``folder``, in the format of ``sha256sum``."""
    (folder / DIGESTS).write_text(f"{_sha256(folder / CHECKPOINT)}  {CHECKPOINT}\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
