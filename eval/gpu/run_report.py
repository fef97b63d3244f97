"""Write what a run found as JSON, anew after every part, so that a run that is killed leaves what it had."""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pikv_hf.eval.gpu.checks import Check, PlannedCheck, dtype_name
from pikv_hf.eval.gpu.time_limit import NO_TIME
from pikv_hf.eval.provenance import provenance

#: What the figures mean, for whoever reads the JSON alone.
DEFINITIONS = {
    "checks": "max_error: largest absolute error against float64 on the CPU. bound: twice that of the same computation "
    "in torch, what is multiplied (the scaled query, decoded pages, softmax weights) rounded to the check's dtype and "
    "sums in float32, plus 64 float32 units in the last place of the largest exact magnitude; 1.02 times torch's for "
    "the root mean square of encoded pages, 0 for append_tokens and append_newest.",
    "timing": "Milliseconds between two CUDA events around one call, after warm-up; 2 GiB are read before each call, "
    "which takes the L2 cache and keeps the GPU busy while the call is queued.",
    "copy_bandwidth": "A device-to-device copy of one large tensor: bytes read plus bytes written, per second.",
    "bytes_read": "All tensors of the pages of keys and values, scales included, the page table, counts and lengths.",
    "copy_share": "Bytes per second at the median, divided by the copy bandwidth measured in this run.",
    "sdpa_ratio": "Median milliseconds of torch's scaled_dot_product_attention on dense bf16 keys and values of the "
    "same shape, enable_gqa, in its fastest backend (sdpa_backend), divided by the kernel's. Of latent attention: on "
    "keys and values of every head, as they are expanded from latents beforehand; the projections are not in it.",
    "dynamic_ratio": "Median milliseconds of DynamicCache's step, keys and values concatenated with the new token and "
    "torch's scaled_dot_product_attention, divided by those of append_newest and attention to lists of pages.",
    "matmul_ratio": "Median milliseconds of two bf16 matmuls and a float32 softmax over dense latents and rotary keys, "
    "queries having the projection absorbed, divided by the kernel's.",
    "tflops": "10**12 multiplications and additions of both products of latent attention per second at the median.",
}


def slug(name: str) -> str:
    """Return a GPU's name as part of a file name: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver, None if it does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return told[0] if told else None


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Return name, driver, memory, multiprocessors and L2 size of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
    }


def checks_part(results: Sequence[Check | PlannedCheck]) -> dict[str, Any]:
    """Return the part of the checks: how many passed and failed, every check, and the names of those not run."""
    checks = [result for result in results if isinstance(result, Check)]
    unrun = [result for result in results if isinstance(result, PlannedCheck)]
    return {
        "passed": sum(check.ok for check in checks),
        "failed": sum(not check.ok for check in checks),
        "not_run": [f"{plan.operation}, {plan.case}, {dtype_name(plan.dtype)}, {plan.kind}" for plan in unrun],
        "checks": [{field: getattr(check, field) for field in Check.__slots__} for check in checks],
    }


class Report:
    """The JSON of a run.

    Parameters
    ----------
    folder : Path
        Where to write it; made if it is not there.
    gpu : dict
        Of :func:`gpu_facts`; its name is part of the file name.
    """

    def __init__(self, folder: Path, gpu: dict[str, Any]) -> None:
        self.path = folder / f"gpu-check-{slug(gpu['name'])}.json"
        self.content: dict[str, Any] = {
            **provenance(),
            "gpu": gpu,
            "definitions": DEFINITIONS,
            "complete": False,
            "seconds": None,
        }

    def add(self, seconds: float, **parts: Any) -> None:
        """Add or replace parts, and write the file anew; `seconds` is what the run took up to now."""
        self.content |= parts | {"seconds": round(seconds, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


def not_run(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the measurements that there was no time for."""
    names = ("operation", "geometry", "case", "kind", "tokens", "batch")
    return [", ".join(str(row[name]) for name in names if name in row) for row in rows if row["note"] == NO_TIME]
