"""`pikv chat` and `pikv store`: a conversation that another process goes on with, and what its folder has."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_lines import run

SAID = "one two three four five\nsix seven\n"


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def said(lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        arguments = ["chat", "--model", "reference", "--max-new-tokens", "3", "--greedy", "--system", "word " * 40]
        outcome = run([*arguments, "--store", str(tmp_path / "contexts"), "--device", "cpu"])
        assert outcome.status == 0, outcome
        return outcome.output

    return said


def counts(output: str) -> list[tuple[int, int]]:
    return [(int(reused), int(read)) for reused, read in re.findall(r"\[(\d+) tokens reused, (\d+) read", output)]


def test_a_chat_goes_on_in_another_process(chat: Any, tmp_path: Path) -> None:
    first, second = counts(chat(SAID))
    assert first[0] == 0
    assert second[0] >= first[1] - 1 > 40
    again = counts(chat(SAID))
    assert [read for _, read in again] == [1, 1]
    assert [sum(turn) for turn in again] == [sum(first), sum(second)]
    output = chat(f"{SAID}/stats\n/save {tmp_path / 'talk.json'}\n/forget\none two\n/what\n/quit\nnot said\n")
    assert "prompts with a known prefix" in output
    assert len(json.loads((tmp_path / "talk.json").read_text())) == 5
    assert counts(output)[2][0] < sum(counts(output)[0])
    assert "[/what: not known" in output
    assert "not said" not in output


def test_a_folder_is_listed_verified_and_pruned(chat: Any, tmp_path: Path) -> None:
    chat(SAID)
    folder = str(tmp_path / "contexts")
    listed = run(["store", "ls", folder]).output
    files = sorted((tmp_path / "contexts").glob("*/ctx-*"))
    assert all(file.name[4:12] in listed for file in files)
    size = sum(file.stat().st_size for file in files)
    assert f"{len(files)} files, {size:,} bytes" in run(["store", "stats", folder]).output
    assert run(["store", "verify", folder]).status == 0
    content = bytearray(files[0].read_bytes())
    content[-3] ^= 1
    files[0].write_bytes(content)
    damaged = run(["store", "verify", folder])
    assert damaged.status == 1
    assert files[0].name in damaged.output
    assert "files removed" in run(["store", "prune", folder, "--to", "0B"]).output
    assert not list((tmp_path / "contexts").glob("*/ctx-*"))
    assert "no contexts" in run(["store", "ls", folder]).output
