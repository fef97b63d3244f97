"""The study of budgets on a pretrained model, run with the bundled one, and its committed results."""

import json
from pathlib import Path
from typing import Any

import pytest

from pikv_hf.eval.studies.scheduling import pretrained_budgets
from pikv_hf.eval.tasks import reference

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "budgets-smollm2.json"


@pytest.mark.slow
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured once, kept, and not measured again; budgets hold, in chunks too."""
    monkeypatch.setattr(pretrained_budgets, "LENGTH", 512)
    monkeypatch.setattr(pretrained_budgets, "CHUNK", 128)
    # Of small pages little is needed in any case.
    monkeypatch.setattr(pretrained_budgets, "OPTIONS", {**pretrained_budgets.OPTIONS, "page_size": 8})
    monkeypatch.setattr(pretrained_budgets, "TASKS", ("niah_single_1", "niah_multikey_1"))
    monkeypatch.setattr(
        pretrained_budgets,
        "generate",
        lambda _, *sizes, tasks, **rest: [
            sample for sample in reference.generate(*sizes, **rest) if sample.task in tasks
        ],
    )
    monkeypatch.setattr(pretrained_budgets, "score", reference.score)
    arguments = ["--model", "reference", "--dtype", "float32", "--samples", "2", "--pages"]
    arguments += ["--parts", str(tmp_path / "parts.jsonl"), "--output"]
    pretrained_budgets.main([*arguments, str(tmp_path / "once.json")])
    monkeypatch.setattr(pretrained_budgets.Reader, "measured", None)
    pretrained_budgets.main([*arguments, str(tmp_path / "again.json")])
    once, again = (json.loads((tmp_path / name).read_text())["ruler"] for name in ("once.json", "again.json"))
    assert once == again
    rows = {row["way"]: row for row in once}
    assert len(rows) == 1 + 4 * 2
    assert all(row["samples"] == 4 for row in once)
    assert rows["full"]["score"] == 100
    # In float32, with positions, host bookkeeping and what is remembered of recall beside keys and values.
    assert rows["full"]["held"] > 2
    for row in (row for row in once if row["way"] != "full"):
        assert row["held"] < 1
        assert row["minus_full"] == pytest.approx(row["score"] - 100)
    assert rows["budget 12.5%"]["held"] < rows["budget 25%"]["held"]
    assert rows["budget 25%"]["score"] >= rows["pages 25%"]["score"]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["way"]: row for row in json.loads(RESULTS.read_text())["ruler"]}


@pytest.mark.parametrize("share", [25])
def test_a_budget_does_what_the_press_does(rows: dict[str, dict[str, Any]], share: float) -> None:
    """Within 3 points of it for no more bytes, or within the interval; in chunks within 10 of reading at once."""
    whole, press, chunks = (
        rows[name] for name in (f"budget {share:g}%", f"press {share:g}%", f"budget {share:g}% in chunks of 512")
    )
    assert whole["samples"] == press["samples"] == chunks["samples"]
    assert whole["held"] <= press["held"] + 0.005
    assert whole["score"] >= press["score"] - 3 - whole.get("minus_press_ci", 0)
    assert chunks["score"] >= whole["score"] - 10
