"""The study of budgets measures what it says, and its committed results are complete."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pikv_hf.config import JOINT, SCHEDULERS
from pikv_hf.eval.reference.synthetic import text
from pikv_hf.eval.studies.scheduling import budget_runs, budget_study
from pikv_hf.eval.studies.scheduling.budget_runs import (
    GENERATED,
    NEEDLES,
    OPTIONS,
    PROMPT,
    RANDOM,
    Generator,
    make_cache,
)
from pikv_hf.eval.studies.scheduling.budget_study import PRESSES, SEQUENTIAL, SHARES, Study, interval, main, tables_of
from pikv_hf.eval.studies.scheduling.decoding_ways import WAYS
from pikv_hf.eval.tasks import reference

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "budgets.json"


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator()


def test_documents_hold_their_needles_where_they_should(generator: Generator) -> None:
    documents = generator.documents(6, seed=3)
    for document in documents:
        assert (len(document.prompt), len(document.generated)) == (PROMPT, GENERATED)
        prompt, generated = (generator.tokenizer.decode(part) for part in (document.prompt, document.generated))
        for number, (key, value) in enumerate(document.needles):
            needle = " ".join(text.split_tokens(text.needle(key, value)))
            here, there = (prompt, generated) if number < NEEDLES else (generated, prompt)
            assert (needle in _spaced(here), needle in _spaced(there)) == (True, False)
    assert len({tuple(document.prompt.tolist()) for document in documents}) == 6
    assert torch.equal(generator.documents(6, seed=3)[2].generated, documents[2].generated)


def _spaced(decoded: str) -> str:
    return " ".join(text.split_tokens(decoded))


def test_everything_is_found_without_a_budget_and_less_with_a_small_one(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_runs, "GENERATED", 128)
    documents = generator.documents(2, seed=1)
    found, held = generator.find(documents, None, 0, {})
    assert found == [(1.0, 1.0)] * 2
    assert held == PROMPT + 128
    found, held = generator.find(documents, "streaming_llm", 96, {"placement": "hash", "num_shards": 1})
    assert all(each.in_prompt == 0 for each in found)
    assert 64 < held <= 96


@pytest.mark.parametrize("name", PRESSES)
def test_presses_find_everything_with_room_for_it_and_keep_to_less(
    name: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget_runs, "GENERATED", 64)
    documents = generator.documents(2, seed=1)
    found, _ = generator.find_by_press(documents, WAYS[name], 2 * (PROMPT + 64))
    assert found == [(1.0, 1.0)] * 2
    _, held = generator.find_by_press(documents, WAYS[name], 160)
    # `DecodingPress` leaves the prompt alone; tables and pages that are not full come on top of tokens.
    assert held <= (PROMPT + 16 if "Decoding" in name else 200)


def test_the_control_lets_any_page_go(generator: Generator) -> None:
    cache = make_cache(generator.model, RANDOM, 112, **OPTIONS)
    ids = generator.documents(1, seed=0)[0].prompt[None]
    with torch.no_grad():
        generator.model(ids, past_key_values=cache)
        cache.memory_report()
    evicted = [~layer.stored_mask()[0, 0] for layer in cache.layers]
    assert all(112 >= PROMPT - int(gone.sum()) > 80 for gone in evicted)
    assert len({tuple(gone.tolist()) for gone in evicted}) == len(evicted)
    # Neither the oldest nor the newest first.
    assert all(bool(gone[: PROMPT // 2].any()) and not bool(gone[: PROMPT // 2].all()) for gone in evicted)


def test_ruler_reads_its_context_in_chunks(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    forward = generator.model.forward

    def watched(ids: torch.Tensor, **more: Any) -> Any:
        lengths.append(ids.shape[1])
        return forward(ids, **more)

    sample = reference.generate(256, 1, tasks=["niah_single_2"], seed=5)[0]
    monkeypatch.setattr(generator.model, "forward", watched)
    assert generator.ruler(sample, None, 0.25, 64) == 100
    assert lengths[:3] == [64, 64, 64]
    assert max(lengths) == 64


def test_parts_are_kept_and_taken_again(tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_study, "Generator", lambda *_: generator)
    arguments = argparse.Namespace(documents=1, samples=0, seed=0, dtype="float32", parts=tmp_path)
    study = Study(arguments)
    names = [name.split()[0] for name in study.parts()]
    assert names.count("generation") == 1 + len(SHARES) * (len(SCHEDULERS) + 2) + len(SEQUENTIAL)
    assert names.count("pressed") == len(SHARES) * len(PRESSES) == len(names) - names.count("generation")
    calls: list[int] = []

    def part() -> dict[str, Any]:
        calls.append(1)
        return {"scheduler": "h2o"}

    assert study.measure("a part", part) == study.measure("a part", part)
    assert len(calls) == 1


def test_scores_are_compared_by_sample() -> None:
    def row(name: str, scores: list[float]) -> dict[str, Any]:
        return {"scheduler": name, "scores": scores, "seconds": 1.0}

    measured = {"ruler full": row("full", [100.0, 50.0, 0.0]), "ruler lru": row("lru", [100.0, 0.0, 0.0])}
    full, lru = tables_of(measured)["ruler"]
    assert (full["difference"], full["score"]) == (0, 50)
    assert lru["difference"] == pytest.approx(-50 / 3)
    assert lru["difference_ci"] == pytest.approx(1.96 * 28.8675 / 3**0.5, abs=1e-3)
    assert interval([4.0]) == 0


def test_the_command_writes_its_rows(
    tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget_study, "Generator", lambda *_: generator)
    monkeypatch.setattr(budget_runs, "GENERATED", 96)
    output = tmp_path / "budgets.json"
    arguments = ["--documents", "1", "--samples", "0", "--output", str(output)]
    main([*arguments, "--only", "generation full", "generation pikv 0.5"])
    written = json.loads(output.read_text())
    assert [row["scheduler"] for row in written["generation"]] == ["full", "pikv"]
    assert written["generation"][0]["both"] == 100
    assert "Needles found after a long generation" in capsys.readouterr().out


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def test_the_committed_results_are_complete(results: dict[str, Any]) -> None:
    rows = {(row["scheduler"], row["share"], row["placement"]): row for row in results["generation"]}
    expected = {(name, share, "expert") for name in (*SCHEDULERS, JOINT, RANDOM) for share in SHARES}
    assert set(rows) == expected | {("full", 1.0, "expert")} | {(name, 0.25, "sequential") for name in SEQUENTIAL}
    assert all(row["held"] <= row["budget"] for row in rows.values())
    assert all(row["documents"] >= 16 for row in rows.values())
    assert rows["full", 1.0, "expert"]["both"] >= 99
    ruler = {row["scheduler"]: row for row in results["ruler"]}
    assert set(ruler) == {"full", *SCHEDULERS, JOINT, RANDOM}
    assert len({row["samples"] for row in ruler.values()}) == 1


def test_joint_decisions_are_among_the_best(results: dict[str, Any]) -> None:
    """Within the interval of the best at every budget, and ahead of chance and of the newest tokens alone."""
    for share in SHARES:
        rows = {row["scheduler"]: row for row in results["generation"] if row["share"] == share}
        best = max(rows.values(), key=lambda row: row["both"])
        ours = rows[JOINT]
        assert ours["both"] >= best["both"] - best["both_ci"], (share, ours["both"], best["scheduler"], best["both"])
        assert ours["both"] - ours["both_ci"] > max(rows["random"]["both"], rows["streaming_llm"]["both"])


def test_the_committed_results_say_where_they_come_from(results: dict[str, Any]) -> None:
    assert re.match(r"python -m pikv_hf\.eval\.(experiments|studies\.scheduling)\.budget_study ", results["command"])
    assert not re.search(r'[ "=]/\w|~/', RESULTS.read_text()), "the file names a folder of the machine"
