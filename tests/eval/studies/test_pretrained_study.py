"""The study of routing on a pretrained model, run with the bundled one, and its committed results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pikv_hf.eval.studies.routing import pretrained_study
from pikv_hf.eval.studies.routing.pretrained_study import Part, known_bytes
from pikv_hf.eval.tasks import reference
from pikv_hf.kernels.page_codes import empty_codes

RESULTS = Path(__file__).parents[3] / "eval" / "results" / "routing-smollm2.json"


@pytest.mark.slow
def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measured once, kept, and not measured again; what reads all pages but those of the answer is exact."""
    part = Part(512, 8, ("page_bound", "page_mass"), 2)
    monkeypatch.setattr(pretrained_study, "SHARES", (1.0, 0.25))
    monkeypatch.setattr(pretrained_study, "TASKS", ("niah_single_1", "niah_multikey_1"))
    monkeypatch.setattr(pretrained_study, "plan", lambda samples: [part])
    monkeypatch.setattr(pretrained_study, "generate", lambda _, *sizes, **rest: reference.generate(*sizes, **rest))
    monkeypatch.setattr(pretrained_study, "score", reference.score)
    arguments = ["--model", "reference", "--parts", str(tmp_path / "parts"), "--output"]
    pretrained_study.main([*arguments, str(tmp_path / "once.json")])
    monkeypatch.setattr(pretrained_study, "measured", None)
    pretrained_study.main([*arguments, str(tmp_path / "again.json")])
    once, again = (json.loads((tmp_path / name).read_text())["ruler"] for name in ("once.json", "again.json"))
    assert once == again
    assert [(row["policy"], row["share"], row["samples"]) for row in once] == [
        (policy, share, 4) for policy in part.policies for share in (1.0, 0.25)
    ]
    for row in once:
        assert row["exact"] == 100
        assert row["read"] == pytest.approx(row["share"], abs=0.02)
        if row["share"] == 1:
            assert (row["difference"], row["difference_ci"]) == (0, 0)


@pytest.mark.parametrize(("page_size", "dim"), [(16, 64), (8, 64), (32, 128)])
def test_bytes_that_ranking_reads(page_size: int, dim: int) -> None:
    codes = empty_codes("int2", 1, page_size, dim, torch.float32, torch.device("meta"), keys=True)
    read = sum(tensor.element_size() * tensor.shape[2:].numel() for tensor in codes.tensors())
    assert known_bytes("page_mass", page_size, dim) == pytest.approx(read / (2 * 2 * page_size * dim))
    assert known_bytes("page_bound", page_size, dim) == 2 * 2 * dim / (2 * 2 * page_size * dim)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text())["ruler"]
    return found


def test_masses_lose_less_than_bounds(rows: list[dict[str, Any]]) -> None:
    """At 2,048 tokens and pages of 16: within 2 points of exact at a quarter of the pages."""
    cells = {(row["tokens"], row["page_size"], row["policy"], row["share"]): row for row in rows}
    for share in (0.25, 0.125):
        bound, mass = (cells[2048, 16, policy, share] for policy in ("page_bound", "page_mass"))
        assert bound["samples"] == mass["samples"] == 64
        assert mass["read"] <= share + 0.005
        assert mass["difference"] > bound["difference"]
    assert cells[2048, 16, "page_mass", 0.25]["difference"] >= -2
