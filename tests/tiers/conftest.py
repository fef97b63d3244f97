"""A small model, a prompt, what DynamicCache makes of it, and disks and updates that are watched."""

import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB
from tiered_runs import LENGTH, generate
from transformers import DynamicCache

from pikv_hf.common.tensors import live_bytes
from pikv_hf.layer.layer import PiKVLayer


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build(num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB - 1, (1, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def expected(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What `DynamicCache` gives for the same prompt."""
    return generate(model, ids, DynamicCache(config=model.config))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Check after every update that each layer keeps to its limits; return what fast memory held."""
    update, seen = PiKVLayer.update, []

    def checked(self: PiKVLayer, *args: Any, **kwargs: Any) -> Any:
        result = update(self, *args, **kwargs)
        tiers = self.parts[0].tiers
        if tiers is not None:
            pools = tiers.pools
            fast = live_bytes(tensor for pool in pools for tensor in pool.token_tensors())
            limit = tiers.limit(tiers.fast)
            assert limit is None or fast <= limit
            if "cpu" in tiers.names[1:]:
                lower = live_bytes(tensor for pool in pools for tensor in pool.lower.tensors())
                assert lower <= tiers.limit("cpu")
            seen.extend([] if limit is None else [fast])
        return result

    monkeypatch.setattr(PiKVLayer, "update", checked)
    return seen


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of one MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    gc.collect()
    subprocess.run(["umount", "--lazy", folder], check=True)
