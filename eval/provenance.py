"""Note where a measured figure comes from: machine, versions, commit, date."""

import datetime
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "kvpress", "accelerate", "triton", "numba", "numpy")


def provenance(command: str | None = None) -> dict[str, Any]:
    """Return what is needed to judge and repeat a measurement.

    Parameters
    ----------
    command : str, optional
        What was run; by default this process's command line, without its folder.
    """
    return {
        "command": command or " ".join([_program(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": torch.multiprocessing.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.platform(terse=True),
        },
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}},
    }


def _program() -> str:
    """Return what was started, without its folder: a script, or a module as `python -m` takes it."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name.removesuffix('.__main__')}"


def package_version(package: str) -> str | None:
    """Return the version of a package that is installed, None for others."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Return the commit of this checkout, marked where it was changed; None outside of one."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        # A measurement may be rewriting its own results; they are not what it measures.
        changed = [*git, "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)eval/results"]
        status = subprocess.run(changed, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head} (modified)" if status.stdout.strip() else head
