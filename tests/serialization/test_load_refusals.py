"""What cannot be loaded: other models, other files, damaged tensors and bookkeeping that does not fit."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from edited_files import rewritten, set_tensor
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from save_round_trip import assert_equal
from saved_runs import new_cache, read, shared_model

from pikv_hf import PiKVCache, PiKVConfig, detach
from pikv_hf.integration.attachment import attachment_of
from pikv_hf.serialization.format import FORMAT, VERSION
from pikv_hf.serialization.model_fingerprint import Fingerprint
from pikv_hf.serialization.tensor_file import CacheFileError, TensorFile
from pikv_hf.serialization.tensor_writer import Group, write_tensors

METADATA = {"format": FORMAT, "layout": VERSION}
EXPECTED = {name: [value] for name, value in METADATA.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a small cache that uses most of the format."""
    model = shared_model("gpt_oss")
    cache = read(model, new_cache(model, key_codec="int4", value_codec="lowrank"), tokens=70)
    path = tmp_path_factory.mktemp("saved") / "cache"
    cache.save(path)
    return path


def test_other_models(saved: Path) -> None:
    build = FAMILIES["gpt_oss"].build
    for model, message in (
        (build(seed=1), r"the digest of the weights of \S+ is '\w{16}' there and '\w{16}' here \(6 of 6 parts"),
        (build(rms_norm_eps=1e-3), "rms_norm_eps is 1e-05 there and 0.001 here"),
        (build().to(torch.bfloat16), "dtype is 'float32' there and 'bfloat16' here"),
        (FAMILIES["mixtral"].build(), "more fields of the config"),
    ):
        with pytest.raises(CacheFileError, match=message):
            PiKVCache.load(saved, model)
        assert attachment_of(model) is None, "a model was attached although nothing was loaded"


@pytest.mark.parametrize("name", ["layers.1.self_attn.k_proj.weight", "layers.2.mlp.experts.down_proj", "norm.weight"])
def test_any_parameter_that_was_trained_on_is_noticed(name: str) -> None:
    model = FAMILIES["gpt_oss"].build()
    before = Fingerprint.of(model)
    parameter = model.model.get_parameter(name)
    parameter.data += 1e-3
    part = name.rpartition(".")[0] if name.startswith("norm") else ".".join(name.split(".")[:2])
    assert f"the weights of model.{part} is" in before.differences(Fingerprint.of(model))


def test_the_fingerprint_is_that_of_the_numbers() -> None:
    model = FAMILIES["mixtral"].build()
    before = Fingerprint.of(model)
    new_cache(model)
    model.config.use_cache = False
    for parameter in model.parameters():
        # The same numbers, in another order in memory.
        parameter.data = parameter.data.mT.contiguous().mT if parameter.ndim > 1 else parameter.data
    assert before == Fingerprint.of(model)
    assert before.differences(Fingerprint.of(model)) == ""


def test_files_that_are_no_saved_cache(saved: Path, tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="file"):
        PiKVCache.load(path, model)
    with pytest.raises(IsADirectoryError):
        PiKVCache.load(tmp_path, model)
    for content in (b"", b"abc", b"\0" * 100, b"a text of a few words, and no cache", os.urandom(4000), b"\x10" * 80):
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match="is no saved cache"):
            PiKVCache.load(path, model)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(CacheFileError, match="no saved cache: its header has no metadata"):
        PiKVCache.load(path, model)
    save_file({"weight": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(CacheFileError, match="its format is 'pt', this release reads 'pikv-cache'"):
        PiKVCache.load(path, model)


def test_another_version(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    content = saved.read_bytes()
    path.write_bytes(content.replace(f'"layout":"{VERSION}"'.encode(), b'"layout":"7"', 1))
    with pytest.raises(CacheFileError, match="its layout is '7', this release reads '1', '2', '3', '4', '5'"):
        PiKVCache.load(path, shared_model("gpt_oss"))
    # What releases say that read versions 1 and 2.
    with pytest.raises(CacheFileError, match=f"its layout is '{VERSION}', this release reads '1'"):
        TensorFile(saved, {"format": [FORMAT], "layout": ["1"]})


def test_a_damaged_tensor_is_named(saved: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "cache", bytearray(saved.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheFileError, match=r"tensor 'layers\.\d.*' is damaged: checksum \w{16}, written was \w{16}"):
        PiKVCache.load(path, shared_model("gpt_oss"))
    path.write_bytes(content[:-5])
    size = len(content)
    with pytest.raises(CacheFileError, match=f"has {size - 5} bytes where {size} were written"):
        PiKVCache.load(path, shared_model("gpt_oss"))


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_goes_unnoticed(saved: Path, data: st.DataObject) -> None:
    content = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    first, last = data.draw(st.sampled_from([(0, 8), (8, header), (header, len(content))]), label="part")
    place = data.draw(st.integers(first, last - 1), label="byte")
    if data.draw(st.booleans(), label="cut off"):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255), label="flipped bits")
    path = saved.with_name("damaged")
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        PiKVCache.load(path, shared_model("gpt_oss"))


def test_no_byte_of_a_file_of_tensors_may_change(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, METADATA, [Group.of({"a": torch.arange(3), "b": torch.ones(5, dtype=torch.bool)})])

    def verified() -> dict[str, torch.Tensor]:
        with TensorFile(path, EXPECTED) as file:
            file.verify()
            return {name: file[name].clone() for name in file.specs}

    assert verified()["a"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.raises(CacheFileError):
            verified()
        path.write_bytes(content[:place])
        with pytest.raises(CacheFileError):
            verified()
    path.write_bytes(content + b"\0")
    with pytest.raises(CacheFileError, match="cut off or added to"):
        verified()


PART = "layers.1.parts.0"
MIXED = f"{PART}.pages.int4/lowrank"


def table_of(layers: list[Any]) -> dict[str, Any]:
    return layers[1]["parts"][0]["table"]


INCONSISTENT: dict[str, tuple[Callable[[list[Any], dict[str, torch.Tensor]], Any], str]] = {
    "page beyond": (set_tensor(f"{PART}.page_numbers", 0, 999), "layer 1: page numbers in pool"),
    "page below": (set_tensor(f"{PART}.page_numbers", 0, -1), "layer 1: page numbers"),
    "page twice": (lambda layers, t: t[f"{PART}.page_numbers"].copy_(t[f"{PART}.page_numbers"].roll(1)), "layer 1: "),
    "lengths": (set_tensor(f"{PART}.page_counts", (0, 0), 99), "layer 1: "),
    "row": (set_tensor(f"{PART}.rows", 0, 5), "layer 1: rows"),
    "count": (set_tensor(f"{PART}.pages.plain.count", 0, 9), "counts of pool 'plain'"),
    "position": (set_tensor(f"{MIXED}.positions", (0, 7), 10**6), "positions in pool"),
    "two positions": (set_tensor(f"{MIXED}.positions", (0, 1), 40), "a row has a position twice"),
    "shard": (set_tensor(f"{MIXED}.shard", 0, 3), "shards in pool"),
    "dtype": (lambda layers, t: t.update({f"{MIXED}.keys.codes": t[f"{MIXED}.keys.codes"].short()}), "expected Spec"),
    "shape": (lambda layers, t: t.update({f"{MIXED}.errors": t[f"{MIXED}.errors"][:, :4]}), "expected Spec"),
    "missing": (lambda layers, t: t.pop(f"{MIXED}.values.codes"), "is None, expected Spec"),
    "missing rows": (lambda layers, t: t.pop(f"{PART}.rows"), "makes no sense: KeyError"),
    "unknown": (lambda layers, t: t.update({"layers.1.more": torch.ones(1)}), "1 tensors belong to no layer"),
    "fewer layers": (lambda layers, t: [layers.pop(), t.pop("layers.2.keys"), t.pop("layers.2.values")], "2 layers"),
    "kind": (lambda layers, t: layers[0].update(kind="paged"), "layer 0: it lacks the keys"),
    "state": (lambda layers, t: layers[1]["state"].pop("seen"), r"its state lacks the keys \['seen'\]"),
    "negative": (lambda layers, t: layers[1]["state"].update(dropped=-1), "negative lengths"),
    "option": (lambda layers, t: layers[1]["config"].update(new=1), "unknown option 'new'"),
    "type": (lambda layers, t: table_of(layers).update(dtype="nothing"), "makes no sense: AttributeError"),
    "router": (
        lambda layers, t: layers[1].update(has_expert_router=False),
        "a router was known: False there, True here",
    ),
    "codec": (lambda layers, t: table_of(layers)["pools"][1].update(name="int8"), "has the codecs of"),
    "padding": (lambda layers, t: layers[1]["state"].update(padding=[1]), r"2 rows, paddings \[1\]"),
    "lanes": (lambda layers, t: table_of(layers).update(page_heads=0), "makes no sense: ZeroDivisionError"),
    "dims": (lambda layers, t: table_of(layers).update(key_dim=-1), "makes no sense: RuntimeError"),
    "unknown key": (lambda layers, t: table_of(layers).update(more=1), r"its table .* has the unknown keys \['more'\]"),
    "unknown kind": (lambda layers, t: layers[1].update(kind="linear"), "layer 1: it is of the kind 'linear'"),
    "window": (lambda layers, t: layers[0].update(window=9), "layer 0: "),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_bookkeeping_that_does_not_fit(case: str, saved: Path, tmp_path: Path) -> None:
    change, message = INCONSISTENT[case]
    path = rewritten(saved, tmp_path / "cache", change)
    with pytest.raises(CacheFileError, match=message) as error:
        PiKVCache.load(path, shared_model("gpt_oss"))
    assert str(error.value).startswith(str(path))


RECALL = f"{PART}.scheduler.recall"

REMEMBERED: dict[str, tuple[Callable[[list[Any], dict[str, torch.Tensor]], Any], str]] = {
    "columns": (lambda layers, t: scheduler_of(layers).update(recall_columns=8), "expected Spec"),
    "no columns": (lambda layers, t: scheduler_of(layers).update(recall_columns=0), "is of 0 columns"),
    "numbers": (lambda layers, t: t.update({f"{RECALL}.masses": t[f"{RECALL}.masses"][1:]}), "it is said of"),
    "heads": (
        lambda layers, t: t.update({f"{RECALL}.{name}": t[f"{RECALL}.{name}"][:, :1] for name in ("known", "first")}),
        "of 1 heads what they would recall, of 2",
    ),
    "missing": (lambda layers, t: t.pop(f"{RECALL}.first"), "makes no sense: KeyError"),
}


def scheduler_of(layers: list[Any]) -> dict[str, Any]:
    return layers[1]["parts"][0]["scheduler"]


@pytest.mark.parametrize("case", REMEMBERED)
def test_what_decisions_go_by_has_to_fit(case: str, tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    read(model, cache := new_cache(model, budget=400), tokens=70)
    cache.save(tmp_path / "saved")
    change, message = REMEMBERED[case]
    path = rewritten(tmp_path / "saved", tmp_path / "cache", change)
    with pytest.raises(CacheFileError, match=message):
        PiKVCache.load(path, model)


def test_rewriting_alone_harms_nothing(saved: Path, tmp_path: Path) -> None:
    model = shared_model("gpt_oss")
    path = rewritten(saved, tmp_path / "cache", lambda layers, tensors: None)
    assert_equal(PiKVCache.load(saved, model), PiKVCache.load(path, model))


def test_a_failed_load_attaches_nothing(saved: Path, tmp_path: Path) -> None:
    model = FAMILIES["gpt_oss"].build()
    change, _ = INCONSISTENT["count"]
    with pytest.raises(CacheFileError):
        PiKVCache.load(rewritten(saved, tmp_path / "cache", change), model)
    assert attachment_of(model) is None
    PiKVCache.load(saved, model)
    assert attachment_of(model).active
    detach(model)


# The file


def test_the_format_is_safetensors(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        assert metadata["format"] == "pikv-cache"
        assert PiKVConfig.from_json(metadata["config"]).key_codec == "int4"
        checksums = json.loads(metadata["checksums"])
        assert set(checksums) == set(file.keys())
        for name, checksum in checksums.items():
            assert xxhash.xxh3_64_hexdigest(file.get_tensor(name).view(-1).view(torch.uint8).numpy()) == checksum
    # The zip archive of a pickle would begin with PK, a bare one with 0x80.
    assert saved.read_bytes()[8:9] == b"{"
