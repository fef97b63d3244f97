"""Contexts in files: found again by another store, and skipped where they are damaged, foreign or gone."""

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from context_prompts import FIRST, GREEDY, OPTIONS, OTHER, SECOND, ids, joined
from families import FAMILIES

from pikv_hf import ContextStore


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/ctx-*"))


PROMPTS = [joined(FIRST, SECOND), joined(FIRST, OTHER), FIRST, joined(FIRST, SECOND, OTHER), joined(OTHER, FIRST)]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral_sliding"])
def test_another_store_goes_on(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    expected = [model.generate(prompt, **GREEDY) for prompt in PROMPTS]
    store = ContextStore(model, path=tmp_path, checkpoint_every=16, **OPTIONS)
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert torch.equal(store.generate(prompt, **GREEDY), tokens)
    for order in ([0, 1, 2, 3, 4], [4, 3, 1, 2, 0]):
        again = ContextStore(model, path=tmp_path, checkpoint_every=16, **OPTIONS)
        for number in order:
            assert torch.equal(again.generate(PROMPTS[number], **GREEDY), expected[number])
        stats = again.stats()
        assert stats.misses == 0
        # But for the last token of a prompt nothing is read twice.
        assert stats.tokens_read <= len(PROMPTS) * (1 if family in ("qwen3_moe", "deepseek_v3") else 16)
        assert stats.tokens_loaded


def test_what_contexts_share_is_on_disk_once(model: Any, tmp_path: Path) -> None:
    store = ContextStore(model, path=tmp_path, **OPTIONS)
    document = ids(300, 7)
    store.generate(document, **GREEDY)
    alone = store.stats().file_bytes
    for seed in range(10):
        store.generate(joined(document, ids(10, seed)), **GREEDY)
    header = 3000 * len(files(tmp_path))
    assert store.stats().file_bytes < 1.6 * alone + header
    assert sum(file.stat().st_size for file in files(tmp_path)) == store.stats().file_bytes


def test_files_keep_to_their_limit(model: Any, tmp_path: Path) -> None:
    store = ContextStore(model, path=tmp_path, disk=400_000, **OPTIONS)
    for seed in range(6):
        prompt = joined(FIRST, ids(60, seed))
        assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        assert sum(file.stat().st_size for file in files(tmp_path)) <= 400_000
    assert files(tmp_path)


def test_damaged_foreign_and_half_written_files(model: Any, tmp_path: Path) -> None:
    ContextStore(model, path=tmp_path, **OPTIONS).generate(FIRST, **GREEDY)
    (whole,) = [file for file in files(tmp_path) if file.stat().st_size > 20_000]
    folder = whole.parent
    foreign = folder / "notes.txt"
    foreign.write_text("mine")
    (folder / f"ctx-{'0' * 32}.safetensors").write_bytes(b"\0" * 64)
    (folder / f"ctx-{'1' * 32}.safetensors").write_bytes(whole.read_bytes())
    (folder / ".pikv-left.tmp").write_bytes(b"half")
    content = bytearray(whole.read_bytes())
    content[-5] ^= 1
    whole.write_bytes(content)
    store = ContextStore(model, path=tmp_path, **OPTIONS)
    with pytest.warns(UserWarning, match="skipped and removed") as warned:
        assert torch.equal(store.generate(FIRST, **GREEDY), model.generate(FIRST, **GREEDY))
    assert len(warned) == 3
    assert foreign.read_text() == "mine"
    assert not (folder / ".pikv-left.tmp").exists()
    # It was read anew, and is there again.
    assert ContextStore(model, path=tmp_path, **OPTIONS).get(FIRST)[1] == 40


def test_other_models_options_and_salts_find_nothing(model: Any, tmp_path: Path) -> None:
    ContextStore(model, path=tmp_path, **OPTIONS).generate(FIRST, **GREEDY)
    other = FAMILIES["qwen3_moe"].build(seed=1)
    assert ContextStore(other, path=tmp_path, **OPTIONS).get(FIRST)[1] == 0
    assert ContextStore(model, path=tmp_path, **OPTIONS, key_codec="int8").get(FIRST)[1] == 0
    assert ContextStore(model, path=tmp_path, salt="b", **OPTIONS).get(FIRST)[1] == 0
    assert ContextStore(model, path=tmp_path, **OPTIONS).get(FIRST)[1] == 40


def test_two_stores_on_one_folder(model: Any, tmp_path: Path) -> None:
    one, two = (ContextStore(model, path=tmp_path, **OPTIONS) for _ in range(2))
    one.generate(joined(FIRST, SECOND), **GREEDY)
    assert two.get(joined(FIRST, SECOND))[1] == 70
    two.generate(joined(FIRST, OTHER), **GREEDY)
    assert one.get(joined(FIRST, OTHER))[1] == 70
    one.forget()
    assert not files(tmp_path)
    assert torch.equal(two.generate(joined(FIRST, OTHER), **GREEDY), model.generate(joined(FIRST, OTHER), **GREEDY))


def test_forgetting_leaves_no_token_of_a_context(model: Any, tmp_path: Path) -> None:
    store = ContextStore(model, path=tmp_path, **OPTIONS)
    for prompt in (joined(FIRST, SECOND), joined(FIRST, OTHER), joined(OTHER, SECOND)):
        store.generate(prompt, **GREEDY)
    store.forget(joined(FIRST, SECOND))
    again = ContextStore(model, path=tmp_path, **OPTIONS)
    assert again.get(joined(FIRST, SECOND))[1] in (0, 40)
    assert again.get(joined(OTHER, SECOND))[1] == 60


def test_folders_are_private(model: Any, tmp_path: Path) -> None:
    ContextStore(model, path=tmp_path / "contexts", **OPTIONS).generate(FIRST, **GREEDY)
    made = [tmp_path / "contexts", *(tmp_path / "contexts").iterdir()]
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in made] == [0o700, 0o700]


def test_a_folder_that_cannot_be_used_is_said_once(model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ContextStore(model, path=tmp_path / "file", **OPTIONS)
    with pytest.warns(UserWarning, match="going on without") as warned:
        assert torch.equal(store.generate(FIRST, **GREEDY), model.generate(FIRST, **GREEDY))
    assert len(warned) == 1
    assert store.stats().errors > 1
    assert store.get(FIRST)[1] == 40


def test_a_full_disk_is_said_once(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = ContextStore(model, path=tmp_path, **OPTIONS)
    monkeypatch.setattr("pikv_hf.store.context_file.write_tensors", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert torch.equal(store.generate(FIRST, **GREEDY), model.generate(FIRST, **GREEDY))
    assert not files(tmp_path)


def test_a_file_that_another_process_has_written_anew_is_read_anew(model: Any, tmp_path: Path) -> None:
    """The same context may begin at another token in the file that takes an older one's place."""
    long = joined(FIRST, SECOND)
    one = ContextStore(model, path=tmp_path, **OPTIONS)
    one.generate(FIRST, **GREEDY)
    one.generate(long, **GREEDY)
    known = {file.name: file.stat().st_size for file in files(tmp_path)}
    two = ContextStore(model, path=tmp_path, **OPTIONS)
    two.forget()
    two.generate(long, **GREEDY)
    anew = {file.name: file.stat().st_size for file in files(tmp_path)}
    assert any(anew[name] != known[name] for name in anew.keys() & known.keys())
    # The store that knew the older ones has them in memory no more.
    one._memory.forget(FIRST[0, :0].numpy())
    assert torch.equal(one.generate(long, **GREEDY), model.generate(long, **GREEDY))
    assert one.stats().errors == 0
    assert {file.name for file in files(tmp_path)} >= anew.keys()


def test_a_link_is_not_written_through(model: Any, tmp_path: Path) -> None:
    store = ContextStore(model, path=tmp_path, **OPTIONS)
    store.generate(FIRST, **GREEDY)
    names = [file.name for file in files(tmp_path)]
    folder = files(tmp_path)[0].parent
    store.forget()
    outside = tmp_path / "outside"
    outside.write_text("mine")
    for name in names:
        (folder / name).symlink_to(outside)
    with pytest.warns(UserWarning, match="going on without"):
        assert torch.equal(store.generate(FIRST, **GREEDY), model.generate(FIRST, **GREEDY))
    assert outside.read_text() == "mine"
