"""RULER as the evaluation runs it, and as the Hub's data set has it."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
from ruler_tokenizers import tokenizer_named

from pikv_hf.eval.tasks import ruler
from pikv_hf.eval.tasks.ruler import generate, load_hub
from pikv_hf.eval.tasks.sample import EvalSample


class TestRun:
    def test_ids_limits_and_lengths(self) -> None:
        samples = generate(tokenizer_named("reference"), 1024, 2)
        assert [sample.id for sample in samples] == [f"{task}-{n:04d}" for task in ruler.TASKS for n in range(2)]
        limits = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
        assert all(sample.max_new_tokens == limits[sample.task.split("_")[0]] for sample in samples)
        assert {sample.length for sample in samples} == {1024}
        assert len(ruler.TASKS) == len(set(ruler.TASKS)) == 13
        assert json.loads(json.dumps([dict(sample.extra) for sample in samples]))

    def test_seed_fixes_samples_whatever_else_is_asked_for(self) -> None:
        tokenizer = tokenizer_named("reference")
        everything = generate(tokenizer, 1024, 3, seed=5)
        for task in ("niah_multikey_3", "vt", "cwe", "fwe", "qa_2"):
            wanted = [sample for sample in everything if sample.task == task]
            assert generate(tokenizer, 1024, 3, seed=5, tasks=[task]) == wanted
            assert generate(tokenizer, 1024, 2, seed=5, tasks=[task]) == wanted[:2]
            others = generate(tokenizer, 1024, 3, seed=6, tasks=[task])
            assert not {sample.context for sample in others} & {sample.context for sample in wanted}

    def test_no_two_samples_are_alike(self) -> None:
        samples = generate(tokenizer_named("reference"), 1024, 100)
        assert len({(sample.context, sample.question) for sample in samples}) == len(samples) == 1300

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"tasks": ["niah_singel_1"]}, r"unknown RULER task 'niah_singel_1', did you mean 'niah_single_1'\?"),
            ({"tasks": ["poetry"]}, r"unknown RULER task 'poetry', expected one of niah_single_1, "),
            ({"tasks": ["vt", "vt"]}, r"RULER task 'vt' is given 2 times, expected once"),
            ({"samples": 0}, r"samples must be at least 1, got 0"),
            ({"length": -1}, r"length must be at least 1, got -1"),
        ],
    )
    def test_wrong_requests(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            generate(tokenizer_named("reference"), **{"length": 1024, "samples": 1, **change})

    def test_progress_is_shown_on_the_error_stream(self, capsys: pytest.CaptureFixture[str]) -> None:
        generate(tokenizer_named("reference"), 1024, 1, tasks=["vt"], progress=True)
        captured = capsys.readouterr()
        assert "RULER 1024" in captured.err
        assert captured.out == ""


def hub_row(task: str, **changes: Any) -> dict[str, Any]:
    row = {
        "context": f"c {task}",
        "question": "q",
        "answer_prefix": "p",
        "answer": ["1", "2"],
        "task": task,
        "max_new_tokens": 30,
        **changes,
    }
    return {field: value for field, value in row.items() if value is not None}


class TestHub:
    def patch(self, monkeypatch: pytest.MonkeyPatch, rows: Sequence[dict[str, Any]]) -> list[Any]:
        calls: list[Any] = []

        def load_dataset(*args: Any, **kwargs: Any) -> Sequence[dict[str, Any]]:
            calls.append((args, kwargs))
            return rows

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return calls

    def test_rows_become_samples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.patch(monkeypatch, [hub_row("vt"), hub_row("cwe"), hub_row("vt"), hub_row("vt")])
        samples = load_hub(4096, samples=2, tasks=["vt"])
        assert calls == [(("simonjegou/ruler", "4096"), {"split": "test"})]
        expected = EvalSample("vt-0000", "vt", "c vt", "q", "p", ("1", "2"), 30, 4096)
        assert samples == [expected, dataclasses.replace(expected, id="vt-0001")]

    def test_what_is_missing_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch(monkeypatch, [hub_row("vt"), hub_row("vt", answer=None)])
        with pytest.raises(ValueError, match=r"simonjegou/ruler, row 1: column 'answer' is missing"):
            load_hub(4096, tasks=["vt"])
        self.patch(monkeypatch, [hub_row("vt")])
        with pytest.raises(ValueError, match=r"expected 1 samples of cwe, found 0"):
            load_hub(4096, tasks=["vt", "cwe"])
        with pytest.raises(ValueError, match=r"expected 2 samples of vt, found 1"):
            load_hub(4096, tasks=["vt"], samples=2)
        with pytest.raises(ValueError, match=r"did you mean 'vt'"):
            load_hub(4096, tasks=["vtt"])
        with pytest.raises(ValueError, match=r"samples must be at least 1, got 0"):
            load_hub(4096, samples=0)

    def test_no_network_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def offline(*args: Any, **kwargs: Any) -> None:
            raise ConnectionError("Couldn't reach the Hub\nand more")

        monkeypatch.setattr("datasets.load_dataset", offline)
        with pytest.raises(ValueError, match=r"^data set simonjegou/ruler, length 4096: Couldn't reach the Hub$"):
            load_hub(4096)
