"""Files of caches in parts that cannot be loaded: other parts, damage, bookkeeping that does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from divided_caches import names, spread_over
from edited_files import rewritten, set_tensor
from saved_runs import both, go_on, new_cache, read, shared_model

from pikv_hf import PiKVCache
from pikv_hf.serialization.format import FORMAT, VERSION
from pikv_hf.serialization.tensor_file import CacheFileError, TensorFile

pytestmark = pytest.mark.usefixtures("few_tokens_count")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a small cache on two devices."""
    model = shared_model()
    path = tmp_path_factory.mktemp("saved") / "cache"
    read(model, spread_over(model, 2, **both("int4"), placement="balanced"), tokens=90).save(path)
    return path


def test_another_number_of_parts(saved: Path, tmp_path: Path) -> None:
    model = shared_model()
    there = "it was saved in 2 parts of each layer, on the devices cpu:0, cpu:1"
    with pytest.raises(CacheFileError, match=there + r"; say where to load it: .*devices=\[...\].* with 2 devices"):
        PiKVCache.load(saved, model)
    with pytest.raises(CacheFileError, match=r"it was saved in 2 parts .* 3 devices were given: cpu:0, cpu:1, cpu:2"):
        PiKVCache.load(saved, model, devices=names(3))
    # One device would do for layers whose attention is elsewhere, but not for these.
    with pytest.raises(CacheFileError, match=r"layer 0: it was saved in 2 parts and has the parts \[0\] of 1 here"):
        PiKVCache.load(saved, model, devices=names(1))
    with pytest.raises(ValueError, match="'disk'"):
        PiKVCache.load(saved, model, devices=["cpu:0", "disk"])
    read(model, new_cache(model)).save(tmp_path / "one")
    with pytest.raises(CacheFileError, match="it was saved in 1 part of each layer; 2 devices were given"):
        PiKVCache.load(tmp_path / "one", model, devices=names(2))
    assert PiKVCache.load(tmp_path / "one", model, devices=names(1)).layers[0].layout.parts == 1


def test_options(saved: Path) -> None:
    model = shared_model()
    loaded = PiKVCache.load(saved, model, devices=names(2), budget=60)
    go_on(model, loaded)
    assert all(part.scheduler.pages_evicted for layer in loaded.layers for part in layer.parts)
    with pytest.raises(ValueError, match="budget_scope='shard' was asked for, but the cache was saved with None"):
        PiKVCache.load(saved, model, devices=names(2), budget=60, budget_scope="shard")


def test_a_damaged_part(saved: Path, tmp_path: Path) -> None:
    with TensorFile(saved, {"format": [FORMAT], "layout": [VERSION]}) as file:
        content, name = bytearray(saved.read_bytes()), "layers.1.parts.1.pages.int4.keys.codes"
        length = int.from_bytes(content[:8], "little")
        place = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
        assert file.specs[name].nbytes
    content[8 + length + place] ^= 1
    (tmp_path / "cache").write_bytes(content)
    with pytest.raises(CacheFileError, match=f"tensor '{name}' is damaged: checksum"):
        PiKVCache.load(tmp_path / "cache", shared_model(), devices=names(2))


def in_both(layers: list[Any], tensors: dict[str, torch.Tensor]) -> None:
    """Give the second part a token of the first."""
    first, second = (tensors[f"layers.0.parts.{part}.pages.int4.positions"] for part in (0, 1))
    row, other = (rows_of(tensors, f"layers.0.parts.{part}") for part in (0, 1))
    # Pages of the same row in both.
    second[other[0], 0] = first[row[0], 0]


def rows_of(tensors: dict[str, torch.Tensor], prefix: str) -> list[int]:
    """Return the packed pages of the first sequence."""
    counts = tensors[f"{prefix}.page_counts"]
    before, packed = int(counts[0, :2].sum()), int(counts[0, 2])
    return tensors[f"{prefix}.page_numbers"][before : before + packed].tolist()


def parts_of(layers: list[Any]) -> list[dict[str, Any]]:
    return layers[1]["parts"]


PART = "layers.1.parts.1"
INCONSISTENT: dict[str, tuple[Callable[[list[Any], dict[str, torch.Tensor]], Any], str]] = {
    "in both": (in_both, "layer 0: a row has a position in two parts"),
    "window": (set_tensor(f"{PART}.pages.plain.keys", 0, 7), "part 1: the window of sequence 0 is not that of"),
    "experts": (set_tensor(f"{PART}.pages.plain.experts", (0, 0), 99), "part 1: the window of sequence 0 is not that"),
    "rows": (lambda layers, t: t[f"{PART}.rows"].fill_(0), "part 1: rows are of sequences"),
    "other rows": (lambda layers, t: t.update({f"{PART}.rows": torch.tensor([0, 1, 1])}), "part 1: its rows are of"),
    "page beyond": (set_tensor(f"{PART}.page_numbers", 0, 999), "layer 1: part 1: page numbers in pool"),
    "count": (set_tensor(f"{PART}.pages.plain.count", 0, 9), "layer 1: part 1: counts of pool 'plain'"),
    "missing": (lambda layers, t: t.pop(f"{PART}.pages.int4.values.codes"), "is None, expected Spec"),
    "unknown": (lambda layers, t: t.update({"layers.1.parts.2.rows": torch.ones(1)}), "1 tensors belong to no layer"),
    "no shards": (lambda layers, t: layers[1].update(has_shard_map=False), "shards of 2 parts, with 2 tables"),
    "fractions": (set_tensor("layers.1.shard_map.fractions", 0, 0.7), "the shares of the parts in the shards add up"),
    "loads": (set_tensor("layers.1.shard_map.loads", 0, -1), "tokens: .* of shards"),
    "placed": (lambda layers, t: t["layers.1.shard_map.placed"].fill_(float("nan")), "tokens: .* of shards"),
    "shape": (
        lambda layers, t: t.update({"layers.1.shard_map.loads": torch.zeros(9, dtype=torch.long)}),
        "expected Spec",
    ),
    "no table": (lambda layers, t: parts_of(layers)[1].update(table=None), "1 of 2 parts have a table"),
    "one part": (lambda layers, t: parts_of(layers).pop(), "belong to no layer"),
    "numbers": (lambda layers, t: parts_of(layers)[1].update(number=2), "makes no sense"),
    "parts": (lambda layers, t: layers[1].update(num_parts=3), "makes no sense"),
    "more": (lambda layers, t: parts_of(layers)[1].update(more=3), "a part .* has the unknown keys"),
    "not one": (lambda layers, t: layers[1].pop("parts"), "it lacks the keys"),
    "heads": (lambda layers, t: parts_of(layers)[1]["table"].update(heads=4), "part 1: its heads is 4"),
    "experts of another router": (
        lambda layers, t: layers[1]["state"].update(expert_loads=[1, 2]),
        "loads of 2 experts, the ",
    ),
    "expert loads": (lambda layers, t: layers[1]["state"].update(expert_loads=[1, -1]), "loads of experts are"),
    "page size": (lambda layers, t: layers[1]["config"].update(page_size=16), r"pages of \[8, 16\] tokens"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_parts_that_do_not_fit(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = INCONSISTENT[case]
    path = rewritten(saved, tmp_path / "cache", change)
    with pytest.raises(CacheFileError, match=message) as error:
        PiKVCache.load(path, shared_model(), devices=names(2))
    assert str(error.value).startswith(str(path))
