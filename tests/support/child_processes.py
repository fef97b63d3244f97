"""Python processes of their own, which import the package and `tests/support` from where the tests do."""

import os
from pathlib import Path

import pikv_hf

SUPPORT = Path(__file__).parent


def environment() -> dict[str, str]:
    """Return the variables of a process that tests start: one thread, no network."""
    path = os.pathsep.join([str(SUPPORT), str(Path(pikv_hf.__file__).parents[1])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
