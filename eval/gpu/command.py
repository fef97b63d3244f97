"""Parse the command line of the GPU check, and say what is missing where it cannot run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pikv_hf.eval.gpu.time_limit import TimeLimit

DESCRIPTION = "Check every kernel of pikv_hf on an NVIDIA GPU against float64, then measure the bandwidth it reaches."

#: Exit statuses: everything that ran is right; something is wrong or unchecked; there is nothing to run on.
GREEN, RED, NO_GPU = 0, 1, 2


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.gpu", description=DESCRIPTION)
    parser.add_argument(
        "--output", type=Path, default=Path("eval/results/gpu"), help="folder for the JSON (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a few checks in bf16 and a few measurements")
    parser.add_argument(
        "--time-limit",
        "--budget-seconds",
        dest="time_limit",
        metavar="SECONDS",
        type=float,
        default=330.0,
        help="no check or measurement begins after these (default: %(default)s); what is left out is listed",
    )
    parser.add_argument("--sweep", action="store_true", help="also try other launch parameters of the attention kernel")
    return parser.parse_args(argv)


def missing() -> str:
    """Return what is missing to run, empty if nothing is."""
    if not torch.cuda.is_available():
        return f"an NVIDIA GPU is needed, and torch {torch.__version__} sees none"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is needed: {error}"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = arguments(argv)
    if lacking := missing():
        print(f"gpu-check: {lacking}", file=sys.stderr)
        return NO_GPU
    from pikv_hf.eval.gpu.session import run

    wrong = run(options.output, TimeLimit(options.time_limit), quick=options.quick, sweep=options.sweep)
    return RED if wrong else GREEN
