"""Saving and loading a cache of several parts: on several devices one file has all of them, processes have one each."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, prompts
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from save_processes import CASES, RANKS
from test_device_machine import DeviceMachine
from test_layer_machine import FakeAttachment
from test_save_load import both, go_on, new_cache, read, rewritten, set_tensor, shared_model

from pikv_hf import PiKVCache
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.page_table.page_table import PageTable
from pikv_hf.serialization.layer_loader import SavedPaged
from pikv_hf.serialization.layer_writer import STATE, describe_layer
from pikv_hf.serialization.pool_records import page_notes
from pikv_hf.serialization.save_load import FORMAT, LAYOUT, PARTS_LAYOUT
from pikv_hf.serialization.tensor_file import CacheFileError, TensorFile, write_tensors

KIND = {"format": "machine", "layout": "1"}


@pytest.fixture(autouse=True)
def _few_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # Shards are divided anew, and pages moved, in caches of little more than a hundred tokens too.
    monkeypatch.setattr("pikv_hf.sharding.shard_map.MIN_PAGES", 1)
    monkeypatch.setattr("pikv_hf.layer.page_migration.MIN_PAGES", 1)


def names(devices: int, first: int = 0) -> list[str]:
    return [f"cpu:{first + number}" for number in range(devices)]


def paged(cache: PiKVCache) -> list[PiKVLayer]:
    return [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]


# Comparing


def contents(table: PageTable | None) -> list[dict[str, Any]]:
    """Return all that is known of the pages of each row, in the order of the row's pages, without their numbers."""
    found = []
    for row in [] if table is None else table.rows:
        known: dict[str, Any] = {"window": len(row.window), "open": (row.open >= 0).tolist(), "full": len(row.sealed)}
        for name, pool in table.pages.pools().items():
            if len(ids := row.pages(name)):
                notes = {part: note.pick(pool.index(ids)) for part, note in page_notes(pool).items()}
                known |= {f"{name}.{part}": note.numpy().tobytes() for part, note in notes.items()}
        found.append({**known, "same as": [row is other for other in table.rows]})
    return found


def capacities(cache: PiKVCache) -> list[int]:
    tables = [table for layer in paged(cache) for table in layer.tables()]
    return [pool.capacity for table in tables for pool in table.pages.pools().values()]


def positions(cache: PiKVCache) -> list[list[list[int]]]:
    """Return which positions each row has in each part."""
    tables = [(layer.seen, table) for layer in paged(cache) for table in layer.tables()]
    return [[held.nonzero().flatten().tolist() for held in table.held(seen)] for seen, table in tables]


def assert_equal_layers(mine: PiKVLayer, theirs: PiKVLayer) -> None:
    """Compare everything that a layer consists of but the numbers of its pages."""
    assert {name: getattr(mine, name) for name in STATE} == {name: getattr(theirs, name) for name in STATE}
    assert (mine.config, mine.padding()) == (theirs.config, theirs.padding())
    assert [part.place.number for part in mine.parts] == [part.place.number for part in theirs.parts]
    loads = mine._expert_loads, theirs._expert_loads
    assert (loads[0] is None) == (loads[1] is None)
    assert loads[0] is None or loads[0].tolist() == loads[1].tolist()
    assert_equal_shards(mine, theirs)
    for one, other in zip(mine.parts, theirs.parts, strict=True):
        assert contents(one.table) == contents(other.table)
        if one.table is not None:
            assert one.reads_window == other.table.writer.reads_window
            assert one.table.writer._counts == other.table.writer._counts
            for keys in (True, False):
                bases = one.table.pages.bases(keys), other.table.pages.bases(keys)
                assert all(torch.equal(a, b) for a, b in zip(*bases, strict=True))
        if one.schedule is not None:
            assert vars(one.schedule.policy) == vars(other.schedule.policy)
            assert (one.schedule.now, one.schedule.pages_evicted) == (other.schedule.now, other.schedule.pages_evicted)


def assert_equal_shards(mine: PiKVLayer, theirs: PiKVLayer) -> None:
    assert (mine.shard_map is None) == (theirs.shard_map is None)
    if mine.shard_map is not None:
        one, other = vars(mine.shard_map), vars(theirs.shard_map)
        for name, value in one.items():
            assert value.tobytes() == other[name].tobytes() if isinstance(value, np.ndarray) else value == other[name]


def assert_counted(cache: PiKVCache) -> None:
    """Check that pages are held by as many sequences as their references say."""
    for table in [table for layer in paged(cache) for table in layer.tables()]:
        for name, pool in table.pages.pools().items():
            held = np.concatenate([sequence.pages(name) for sequence in {id(s): s for s in table.rows}.values()])
            assert (pool.refcount == np.bincount(held, minlength=pool.capacity)).all()


def round_trip(
    model: Any, cache: PiKVCache, folder: Path, mask: torch.Tensor | None = None, steps: int = 14
) -> PiKVCache:
    """Save a cache, load it on other devices, compare, and go on with both alike."""
    path, parts = folder / "cache", paged(cache)[0].layout.parts
    cache.save(path)
    loaded = PiKVCache.load(path, model, devices=names(parts, first=3))
    assert [file.name for file in folder.iterdir()] == ["cache"]
    assert [part.place.name for part in paged(loaded)[0].parts] == names(parts, first=3)
    path.unlink()
    for mine, theirs in zip(paged(cache), paged(loaded), strict=True):
        assert_equal_layers(mine, theirs)
    assert_counted(loaded)
    as_it_lay = capacities(cache) == capacities(loaded)
    logits = go_on(model, cache, mask, steps), go_on(model, loaded, mask, steps)
    assert not as_it_lay or torch.equal(*logits)
    assert torch.equal(logits[0].argmax(-1), logits[1].argmax(-1))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
    assert positions(cache) == positions(loaded)
    for mine, theirs in zip(paged(cache), paged(loaded), strict=True):
        assert_equal_shards(mine, theirs)
    assert_counted(loaded)
    return loaded


# Round trips on several devices


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (2, {}),
        (3, both("int4")),
        (2, {**both("lowrank"), "placement": "balanced"}),
        (2, {**both("auto"), "placement": "balanced", "hot_replicas": 2, "num_shards": 6}),
        (4, {"key_codec": "int8", "value_codec": "lowrank+int4", "rank": 4}),
        (3, {"routing": "page_bound", "max_pages": 4, **both("int8")}),
        (2, {"budget": 60, "scheduler": "quest"}),
        (2, {"budget": 0.5, "scheduler": "ada_kv", "num_shards": 4}),
        (2, {"budget": "160KiB", "scheduler": "pikv"}),
        (2, {"budget": 20, "budget_scope": "shard", "scheduler": "h2o"}),
        (2, {"tiers": {"cpu": "24KiB", "disk": None}, **both("int4")}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_several_devices(devices: int, options: dict[str, Any], tmp_path: Path) -> None:
    model = shared_model()
    cache = spread_over(model, devices, **options)
    read(model, cache, **({"tokens": 300, "batch": 1} if "160KiB" in options.values() else {"tokens": 150}))
    if "budget" in options:
        assert any(part.schedule.pages_evicted for layer in cache.layers for part in layer.parts)
    if "tiers" in options:
        pools = [pool for layer in cache.layers for table in layer.tables() for pool in table.pages.sealed.values()]
        assert any(pool.pages_by_tier()["disk"] for pool in pools)
    round_trip(model, cache, tmp_path)


def spread_over(model: Any, devices: int, **options: Any) -> PiKVCache:
    cache = new_cache(model, **options)
    return PiKVCache.for_model(model, cache.pikv_config, devices=names(devices))


def test_uneven_shares(tmp_path: Path) -> None:
    """What devices may give says how later tokens are divided; those that are there stay."""
    model = shared_model()
    memory = {"cpu:0": "1GiB", "cpu:1": "3GiB"}
    options = new_cache(model).pikv_config
    cache = read(model, PiKVCache.for_model(model, options, devices=names(2), max_memory=memory))
    cache.save(tmp_path / "cache")
    loaded = [
        PiKVCache.load(tmp_path / "cache", model, devices=names(2), max_memory=each)
        for each in (memory, {"cpu:0": "3GiB", "cpu:1": "1GiB"})
    ]
    assert all(positions(each) == positions(cache) for each in loaded)
    logits = [go_on(model, each, steps=40) for each in (cache, *loaded)]
    for other in logits[1:]:
        torch.testing.assert_close(logits[0], other, atol=1e-3, rtol=1e-3)
    assert positions(loaded[0]) == positions(cache)
    assert positions(loaded[1]) != positions(cache)


@pytest.mark.parametrize("codec", ["none", "lowrank"])
def test_a_padded_batch(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    inputs = prompts(batch=3, length=120)
    mask = inputs["attention_mask"]
    cache = spread_over(model, 2, **both(codec))
    with torch.no_grad():
        model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), past_key_values=cache)
    round_trip(model, cache, tmp_path, mask)


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_beams_share_their_pages(codec: str, tmp_path: Path) -> None:
    model = shared_model("mixtral")
    cache = spread_over(model, 3, **both(codec))
    model.generate(torch.randint(3, 190, (1, 100)), num_beams=4, max_new_tokens=20, past_key_values=cache)
    loaded = round_trip(model, cache, tmp_path)
    assert loaded.layers[0].batch == 4


def test_partly_evicted(tmp_path: Path) -> None:
    """Each head keeps tokens of its own, in widths of their own; then both go on."""
    model = shared_model()
    cache = read(model, spread_over(model, 2, **both("int4")), tokens=90)
    generator = torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.settle()
        shape = 2, layer.heads, layer.seen
        layer.keep(torch.tensor([0, 2, 4, 8, 16])[torch.randint(0, 5, shape, generator=generator)])
    assert cache.layers[0].lanes == 2
    round_trip(model, cache, tmp_path)


def test_sliding_layers_and_empty_caches(tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    round_trip(model, spread_over(model, 2, **both("int4")), tmp_path, steps=2)
    round_trip(model, read(model, spread_over(model, 2), tokens=60), tmp_path, steps=2)
    round_trip(model, read(model, spread_over(model, 3, sliding_layers="paged"), tokens=60), tmp_path, steps=2)


def test_pages_that_a_crop_has_cut(tmp_path: Path) -> None:
    """Pages that were moved between devices may be cut in the middle of a shard; only then are two of it not full."""
    model = shared_model()
    found = 0
    for length in (71, 101):
        cache = read(model, spread_over(model, 2, num_shards=3), tokens=150)
        with torch.no_grad():
            for step in range(30):
                model(torch.tensor([[5 + step], [6]]), past_key_values=cache)
        cache.crop(length)
        tables = [table for layer in cache.layers for table in layer.tables()]
        found += sum(int((table.pool.count[row.sealed] < 8).sum()) for table in tables for row in table.rows)
        round_trip(model, cache, tmp_path, steps=8)
    assert found


def test_balanced_placement_in_one_place(tmp_path: Path) -> None:
    """The loads by which experts were grouped, from the first prompt, are those of the loaded cache too."""
    model = shared_model()
    cache = read(model, new_cache(model, placement="balanced"))
    cache.save(tmp_path / "cache")
    loaded = PiKVCache.load(tmp_path / "cache", model)
    assert_equal_layers(cache.layers[0], loaded.layers[0])
    assert torch.equal(go_on(model, cache), go_on(model, loaded))
    shards = [[sorted(set(t.pool.shard.tolist())) for t in layer.tables()] for layer in (cache.layers + loaded.layers)]
    assert shards[:2] == shards[2:]
    reports = [[layer.shard_tokens for layer in each.memory_report().layers] for each in (cache, loaded)]
    assert reports[0] == reports[1]


# Random operations


def saved_and_loaded(layer: PiKVLayer) -> PiKVLayer:
    """Return a new layer of as many parts that holds what a file of this one holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer"
        description, groups = describe_layer(0, layer)
        write_tensors(path, {**KIND, "description": json.dumps(description)}, groups)
        with TensorFile(path, KIND) as file:
            file.verify()
            saved = SavedPaged(0, json.loads(file.metadata["description"]), file, {})
            assert saved.specs() == file.specs
            saved.check()
            loaded = PiKVLayer(0, layer.config, FakeAttachment(), layer.layout)
            saved.check_fits(loaded)
            saved.restore(loaded, torch.device("cpu"))
    return loaded


class SavedDeviceMachine(DeviceMachine):
    @rule(which=st.integers(0, 9))
    def save_and_load(self, which: int) -> None:
        twin = self.pick(which)
        twin.layer.settle()
        self.contents_agree()
        loaded = saved_and_loaded(twin.layer)
        assert_equal_layers(twin.layer, loaded)
        twin.layer = loaded


SavedDeviceMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=16)
TestSavedDeviceMachine = SavedDeviceMachine.TestCase


# What cannot be loaded


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
    assert all(part.schedule.pages_evicted for layer in loaded.layers for part in layer.parts)
    with pytest.raises(ValueError, match="budget_scope='shard' was asked for, but the cache was saved with None"):
        PiKVCache.load(saved, model, devices=names(2), budget=60, budget_scope="shard")


def test_releases_that_know_no_parts_refuse_the_file(saved: Path, tmp_path: Path) -> None:
    model = shared_model()
    read(model, new_cache(model)).save(tmp_path / "one")
    for path, layout in ((saved, PARTS_LAYOUT), (tmp_path / "one", LAYOUT)):
        with TensorFile(path, {"format": FORMAT, "layout": layout}) as file:
            assert any(".parts." in name for name in file.specs) == (layout == PARTS_LAYOUT)
    with pytest.raises(CacheFileError, match="its layout is '2', this release reads '1'"):
        TensorFile(saved, {"format": FORMAT, "layout": LAYOUT})


def test_a_damaged_part(saved: Path, tmp_path: Path) -> None:
    with TensorFile(saved, {"format": FORMAT, "layout": PARTS_LAYOUT}) as file:
        content, name = bytearray(saved.read_bytes()), "layers.1.parts.1.pages.int4.tokens.0"
        length = int.from_bytes(content[:8], "little")
        place = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
        assert file.specs[name].nbytes
    content[8 + length + place] ^= 1
    (tmp_path / "cache").write_bytes(content)
    with pytest.raises(CacheFileError, match=f"tensor '{name}' is damaged: checksum"):
        PiKVCache.load(tmp_path / "cache", shared_model(), devices=names(2))


def in_both(layers: list[Any], tensors: dict[str, torch.Tensor]) -> None:
    """Give the second part a token of the first."""
    first, second = (tensors[f"layers.0{part}.pages.int4.positions"] for part in ("", ".parts.1"))
    row, other = (rows_of(tensors, f"layers.0{part}") for part in ("", ".parts.1"))
    # Pages of the same row in both.
    second[other[0], 0] = first[row[0], 0]


def rows_of(tensors: dict[str, torch.Tensor], prefix: str) -> list[int]:
    """Return the packed pages of the first sequence."""
    lengths = tensors[f"{prefix}.lengths"]
    before, packed = int(lengths[0, :2].sum()), int(lengths[0, 2])
    return tensors[f"{prefix}.ids"][before : before + packed].tolist()


def spread_of(layers: list[Any]) -> dict[str, Any]:
    return layers[1]["spread"]


PART = "layers.1.parts.1"
INCONSISTENT: dict[str, tuple[Callable[[list[Any], dict[str, torch.Tensor]], Any], str]] = {
    "in both": (in_both, "layer 0: a row has a position in two parts"),
    "window": (set_tensor(f"{PART}.pages.plain.tokens.0", 0, 7), "part 1: the window of sequence 0 is not that of"),
    "experts": (set_tensor(f"{PART}.pages.plain.experts", (0, 0), 99), "part 1: the window of sequence 0 is not that"),
    "rows": (lambda layers, t: t[f"{PART}.rows"].fill_(0), "part 1: rows are of sequences"),
    "other rows": (lambda layers, t: t.update({f"{PART}.rows": torch.tensor([0, 1, 1])}), "part 1: its rows are of"),
    "page beyond": (set_tensor(f"{PART}.ids", 0, 999), "layer 1: part 1: page numbers in pool"),
    "count": (set_tensor(f"{PART}.pages.plain.count", 0, 9), "layer 1: part 1: counts of pool ''"),
    "missing": (lambda layers, t: t.pop(f"{PART}.pages.int4.tokens.1"), "is None, expected Spec"),
    "unknown": (lambda layers, t: t.update({"layers.1.parts.2.rows": torch.ones(1)}), "1 tensors belong to no layer"),
    "no shards": (lambda layers, t: spread_of(layers).update(shards=False), "shards of 2 parts, with 2 tables"),
    "fractions": (set_tensor("layers.1.shards.fractions", 0, 0.7), "the shares of the parts in the shards add up"),
    "loads": (set_tensor("layers.1.shards.loads", 0, -1), "tokens: .* of shards"),
    "placed": (lambda layers, t: t["layers.1.shards.placed"].fill_(float("nan")), "tokens: .* of shards"),
    "shape": (lambda layers, t: t.update({"layers.1.shards.loads": torch.zeros(9, dtype=torch.long)}), "expected Spec"),
    "no table": (lambda layers, t: spread_of(layers)["others"][0].update(table=None), "1 of 2 parts have a table"),
    "one part": (lambda layers, t: spread_of(layers)["others"].pop(), "makes no sense"),
    "numbers": (lambda layers, t: spread_of(layers).update(numbers=[0, 2]), "makes no sense"),
    "parts": (lambda layers, t: spread_of(layers).update(parts=3), "makes no sense"),
    "more": (lambda layers, t: spread_of(layers).update(more=3), "makes no sense: TypeError"),
    "not one": (lambda layers, t: layers[1].pop("spread"), "belong to no layer"),
    "heads": (lambda layers, t: spread_of(layers)["others"][0]["table"].update(heads=4), "part 1: its heads is 4"),
    "experts of another router": (lambda layers, t: layers[1].update(expert_loads=[1, 2]), "loads of 2 experts, the "),
    "expert loads": (lambda layers, t: layers[1].update(expert_loads=[1, -1]), "loads of experts are"),
    "page size": (lambda layers, t: layers[1]["config"].update(page_size=16), r"pages of \[8, 16\] tokens"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_parts_that_do_not_fit(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = INCONSISTENT[case]
    path = rewritten(saved, tmp_path / "cache", change)
    with pytest.raises(CacheFileError, match=message) as error:
        PiKVCache.load(path, shared_model(), devices=names(2))
    assert str(error.value).startswith(str(path))


# Several processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Return what two processes left: their folder, and what each of them found."""
    folder = tmp_path_factory.mktemp("processes")
    script = Path(__file__).parents[1] / "support" / "save_processes.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-P", script, folder], env=environment, check=True, timeout=120)
    return folder, [json.loads((folder / f"found-{rank}").read_text()) for rank in range(RANKS)]


Found = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("case", CASES)
def test_processes_go_on(case: str, processes: Found) -> None:
    ranks = [found[case] for found in processes[1]]
    for found in ranks:
        assert found["files"] == [f"{case}.0-of-2", f"{case}.1-of-2"]
        assert found["logits"][0] == found["logits"][1] == ranks[0]["logits"][0]
        assert found["held"][0] == found["held"][1]
    assert ranks[0]["held"] != ranks[1]["held"]


def test_what_one_process_cannot_load_none_does(processes: Found) -> None:
    first, second = (found["failures"] for found in processes[1])
    assert first["as it was"] == second["as it was"] == "no error"
    for found in (first, second):
        assert "the files of ranks 0 and 1 are of different saves" in found["mixed"]
        assert found["mixed"].startswith("CacheFileError")
        assert found["another model"].startswith("CacheFileError")
        assert found["never saved"].startswith("FileNotFoundError")
    assert second["damaged"].startswith("CacheFileError")
    assert "is damaged: checksum" in second["damaged"]
    assert second["missing"].startswith("FileNotFoundError")
    told = "ProcessError: rank 0: rank 1 could not load the cache: "
    assert first["damaged"].startswith(told + "CacheFileError")
    assert first["missing"].startswith(told + "FileNotFoundError")


def test_what_one_process_cannot_save_none_does(processes: Found) -> None:
    first, second = (found["save fails"] for found in processes[1])
    assert first["error"].startswith("ProcessError: rank 0: rank 1 could not save the cache: OSError")
    assert second["error"].startswith("OSError: [Errno 28] No space left on device")
    assert "none.1-of-2" in second["error"]
    for found in (first, second):
        assert found["unchanged"]
        assert found["goes on"]
        assert not found["left"]


def test_a_process_that_dies_while_it_saves(processes: Found) -> None:
    assert processes[1][0]["dies"].startswith("ProcessError: rank 0 of 2 got no answer")


def test_files_of_processes_in_one_process(processes: Found) -> None:
    folder, _ = processes
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)
    for devices in (None, names(2)):
        with pytest.raises(CacheFileError, match="was saved by 2 processes, and is to be loaded by 1"):
            PiKVCache.load(folder / "none", model, devices=devices)
        with pytest.raises(
            CacheFileError, match=r'it holds the part of rank 1 of 2 processes; .*process_group="world"'
        ):
            PiKVCache.load(folder / "none.1-of-2", model, devices=devices)
    with pytest.raises(RuntimeError, match="needs several processes"):
        PiKVCache.load(folder / "none", model, process_group="world")
