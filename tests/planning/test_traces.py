"""Routing traces: made up, resized, saved and read again; damaged files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pikv_hf.eval.cli.main import app
from pikv_hf.eval.demo.options import DemoOptions
from pikv_hf.eval.demo.routing_recorder import Recorder
from pikv_hf.eval.demo.task import build_task
from pikv_hf.eval.errors import InputError
from pikv_hf.planning.simulate.routing_trace import Popularity, RoutingTrace, load_trace, save_trace, synthetic_trace

pytestmark = pytest.mark.slow


def trace_of(rows: list[list[int]], num_experts: int = 4, **more: Any) -> RoutingTrace:
    return RoutingTrace(np.array(rows), num_experts, tuple(range(len(rows))), "made up", **more)


def test_round_trip(tmp_path: Path) -> None:
    trace = synthetic_trace(3, 8, 1000, Popularity(skew=1.2), seed=5)
    trace = dataclasses.replace(trace, layers=(1, 3, 4), prompt_tokens=700)
    path = save_trace(trace, tmp_path / "trace.bin")
    read = load_trace(path)
    np.testing.assert_array_equal(read.experts, trace.experts)
    assert read.header() == trace.header()
    assert [each.name for each in tmp_path.iterdir()] == ["trace.bin"]


def test_files_are_small(tmp_path: Path) -> None:
    trace = synthetic_trace(4, 16, 20_000)
    assert save_trace(trace, tmp_path / "trace.npz").stat().st_size < trace.experts.nbytes / 2


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_trace(trace_of([[1, 2]]), tmp_path / "trace.npz")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="no space"):
        save_trace(trace_of([[3, 3]]), path)
    assert load_trace(path).experts.tolist() == [[1, 2]]
    assert [each.name for each in tmp_path.iterdir()] == ["trace.npz"]


def test_resized() -> None:
    trace = trace_of([[0, 1, 2], [3, 3, 0]], prompt_tokens=2)
    longer = trace.resized(5, layers=3)
    assert longer.experts.tolist() == [[0, 1, 2, 0, 1], [3, 3, 0, 3, 3], [0, 1, 2, 0, 1]]
    assert longer.layers == (0, 1, 2)
    assert trace.resized(1).prompt_tokens == 1
    with pytest.raises(ValueError, match="got 0 and 2"):
        trace.resized(0)


def test_loads() -> None:
    assert trace_of([[0, 1, 1], [3, 3, 0]]).loads().tolist() == [[1, 2, 0, 0], [1, 0, 0, 2]]


@pytest.mark.parametrize("stickiness", [0.0, 0.7])
def test_synthetic_shares_follow_zipf(stickiness: float) -> None:
    skew, experts = 1.3, 6
    trace = synthetic_trace(3, experts, 60_000, Popularity(skew=skew, stickiness=stickiness), seed=1)
    wanted = np.arange(1, experts + 1) ** -skew
    shares = np.sort(trace.loads() / trace.tokens, axis=1)[:, ::-1]
    np.testing.assert_allclose(shares, np.broadcast_to(wanted / wanted.sum(), shares.shape), atol=0.02)
    # The same expert twice in a row: by sticking, or by chance.
    again = float((trace.experts[:, 1:] == trace.experts[:, :-1]).mean())
    chance = float(((wanted / wanted.sum()) ** 2).sum())
    assert again == pytest.approx(stickiness + (1 - stickiness) * chance, abs=0.02)


def test_synthetic_layers_prefer_different_experts() -> None:
    favourites = synthetic_trace(12, 64, 5000, Popularity(skew=1.5)).loads().argmax(axis=1)
    assert len(set(favourites.tolist())) > 6


def test_synthetic_topics_change_popularity() -> None:
    trace = synthetic_trace(8, 16, 20_000, Popularity(skew=1.5, topic_tokens=10_000))
    halves = [np.stack([np.bincount(row, minlength=16) for row in part]) for part in np.split(trace.experts, 2, axis=1)]
    assert (halves[0].argmax(axis=1) != halves[1].argmax(axis=1)).any()
    still = synthetic_trace(8, 16, 20_000, Popularity(skew=1.5))
    halves = [np.stack([np.bincount(row, minlength=16) for row in part]) for part in np.split(still.experts, 2, axis=1)]
    assert (halves[0].argmax(axis=1) == halves[1].argmax(axis=1)).all()


def test_synthetic_is_reproducible() -> None:
    np.testing.assert_array_equal(
        synthetic_trace(2, 8, 100, seed=3).experts, synthetic_trace(2, 8, 100, seed=3).experts
    )
    assert (synthetic_trace(2, 8, 100, seed=3).experts != synthetic_trace(2, 8, 100, seed=4).experts).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": np.zeros((2, 0), int)}, r"integers \(layers, tokens\), got int64 \(2, 0\)"),
        ({"experts": np.zeros((2, 3))}, r"got float64 \(2, 3\)"),
        ({"experts": np.full((2, 3), 4)}, r"in 0\.\.3, got 4\.\.4"),
        ({"experts": np.full((2, 3), -1)}, r"got -1\.\.-1"),
        ({"layers": (0,)}, r"2 rows of experts need as many ascending layers, got \(0,\)"),
        ({"layers": (1, 0)}, r"ascending layers, got \(1, 0\)"),
        ({"num_experts": 0}, "num_experts has to be in 1..32767, got 0"),
        ({"prompt_tokens": 9}, r"prompt_tokens has to be in 0\.\.3, got 9"),
    ],
)
def test_wrong_traces(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(trace_of([[0, 1, 2], [3, 3, 0]]), **change)


def test_wrong_sizes_of_synthetic_traces() -> None:
    with pytest.raises(ValueError, match="layers has to be at least 1, got 0"):
        synthetic_trace(0, 4, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topic_tokens": 0}, "topic_tokens has to be at least 1, got 0"),
        ({"skew": -1.0}, "got -1.0 and 0.0"),
        ({"stickiness": 1.0}, r"stickiness in \[0, 1\), got 1.0 and 1.0"),
    ],
)
def test_wrong_popularity_of_synthetic_traces(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Popularity(**given)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_trace(tmp_path / "none.npz")


@pytest.mark.parametrize("content", [b"", b"not a trace", b"PK\x03\x04 neither is this"])
def test_files_that_are_no_trace(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"trace\.npz is no routing trace, or a damaged one"):
        load_trace(path)


def test_truncated_files(tmp_path: Path) -> None:
    path = save_trace(synthetic_trace(2, 8, 300), tmp_path / "trace.npz")
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no routing trace, or a damaged one"):
            load_trace(path)


def test_files_with_a_damaged_byte(tmp_path: Path) -> None:
    trace = synthetic_trace(2, 8, 300)
    path = save_trace(trace, tmp_path / "trace.npz")
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        path.write_bytes(_flipped(whole, place))
        try:
            # Times and names of the archive may change without harm, what is in it may not.
            np.testing.assert_array_equal(load_trace(path).experts, trace.experts)
        except ValueError:
            refused += 1
    assert refused > 0.7 * len(whole)


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 1 is read here, got version 9"),
        ({"tokens": 7}, "the header names 7 tokens, the file has 3"),
        ({"num_experts": 2}, r"in 0\.\.1, got 0\.\.3"),
        ({"num_experts": "many"}, "trace.npz"),
        ({"surprise": 1}, "the header has to have version"),
    ],
)
def test_wrong_headers(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    trace, path = trace_of([[0, 1, 2], [3, 3, 0]]), tmp_path / "trace.npz"
    with path.open("wb") as file:
        np.savez(file, header=np.array(json.dumps({**trace.header(), **change})), experts=trace.experts)
    with pytest.raises(ValueError, match=message):
        load_trace(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with path.open("wb") as file:
        np.savez(file, header=np.array({"version": 1}, dtype=object), experts=np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="is no routing trace"):
        load_trace(path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RoutingTrace, dict[str, Any]]:
    """Return the trace that the demo recorded, and what it printed."""
    file = tmp_path_factory.mktemp("trace") / "demo.npz"
    threads = torch.get_num_threads()
    arguments = ["demo", "--tokens", "600", "--max-new-tokens", "4", "--threads", "1", "--json"]
    try:
        result = CliRunner().invoke(app, [*arguments, "--record-trace", str(file)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return load_trace(file), json.loads(result.stdout)


def test_the_demo_records_every_token_once(recorded: tuple[RoutingTrace, dict[str, Any]]) -> None:
    trace, found = recorded
    task = build_task(DemoOptions(tokens=600))
    asked = [prompt.ids.shape[1] for prompt in task.prompts]
    # The model never reads the last token of an answer.
    answered = [len(answer["token_ids"]) - 1 for answer in found["pikv"]["answers"]]
    assert trace.prompt_tokens == found["context_tokens"]
    assert trace.tokens == trace.prompt_tokens + sum(asked) + sum(answered)
    assert found["options"]["record_trace"].endswith("demo.npz")


def test_the_demo_records_what_the_routers_chose(recorded: tuple[RoutingTrace, dict[str, Any]]) -> None:
    trace, found = recorded
    for layer, row in zip(found["spread"], trace.experts[:, : trace.prompt_tokens], strict=True):
        assert np.bincount(row, minlength=trace.num_experts).tolist() == layer["expert_tokens"]


def test_recording_refuses_a_missing_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--record-trace", str(tmp_path / "none" / "trace.npz")])
    assert result.exit_code == 2
    assert "no folder" in result.output


def test_recording_needs_routers() -> None:
    with pytest.raises(InputError, match="a model has no router"):
        Recorder({}).trace("a model", 0)
