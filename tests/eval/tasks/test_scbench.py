"""SCBench's schema, its scores, and questions about shared contexts with and without a store."""

import json
from pathlib import Path
from typing import Any

import pytest

from pikv_hf import ContextStore
from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.runner.shared_contexts import _conversation, ask_all, message_ids, summary_of
from pikv_hf.eval.tasks.scbench.records import BUNDLED, Record, Turn, read_records, record_of
from pikv_hf.eval.tasks.scbench.sets import TASKS, question, score, task_named


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    return load_reference_model()


@pytest.mark.parametrize("same_context", [False, True])
def test_answers_are_those_without_a_store(reference: tuple[Any, Any], same_context: bool) -> None:
    model, tokenizer = reference
    records = read_records("scbench_vt", BUNDLED)
    asked = [TASKS["scbench_vt"], records]
    plain = list(ask_all(model, tokenizer, *asked, None, same_context, 4))
    stored = list(ask_all(model, tokenizer, *asked, ContextStore(model), same_context, 4))
    assert [(row["answer"], row["score"], row["tokens"]) for row in plain] == [
        (row["answer"], row["score"], row["tokens"]) for row in stored
    ]
    assert all(row["reused"] == 0 for row in plain)
    context = len(tokenizer(records[0].context)["input_ids"])
    for row in stored:
        assert row["read"] + row["reused"] == row["tokens"]
        # The context and what comes before it.
        assert row["turn"] == 0 or row["reused"] >= context - 2
    lengths = [row["tokens"] for row in plain if row["id"] == records[0].id]
    assert same_context or lengths == sorted(lengths)
    summary = summary_of(stored)
    assert summary["questions"] == len(plain) == 6
    assert summary["read"] < summary_of(plain)["read"] / 2


def test_later_questions_come_after_right_answers(reference: tuple[Any, Any]) -> None:
    tokenizer = reference[1]
    ids = message_ids(tokenizer, _conversation(["The grass is", "green", "The sky is"]))
    assert tokenizer.decode(ids[0], skip_special_tokens=True).split() == [
        "The",
        "grass",
        "is",
        "green",
        "The",
        "sky",
        "is",
    ]


@pytest.mark.parametrize("task", sorted(file.stem for file in BUNDLED.glob("*.jsonl")))
def test_the_bundled_sample_is_in_the_schema(task: str) -> None:
    for record in read_records(task, BUNDLED):
        assert record.turns
        for turn in record.turns:
            assert turn.input in question(task_named(task), turn)
            # In a task with options these stand for letters.
            letters = [chr(ord("A") + turn.options.index(answer)) for answer in turn.answers if turn.options]
            every = turn.answers if task_named(task).metric == "string_match_all" else turn.answers[:1]
            assert score(task_named(task), turn, " ".join(letters or every)) == 1
            assert score(task_named(task), turn, "zzz") == 0


def test_a_choice_is_compared_by_its_letter() -> None:
    turn = Turn("Which?", ("granite",), ("oak", "granite"))
    assert "A. oak\nB. granite" in question(TASKS["scbench_choice_eng"], turn)
    found = [score(TASKS["scbench_choice_eng"], turn, answer) for answer in ("B", "(B) granite", "A", "b", "")]
    assert found == [1, 1, 0, 0, 0]
    assert score(TASKS["scbench_many_shot"], Turn("x", ("(C)",)), "(C)") == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([], "expected an object"),
        ({"context": "x"}, "expected an object"),
        ({"context": "x", "multi_turns": []}, "a list of turns"),
        ({"context": 3, "multi_turns": [{}]}, "expected a text"),
        ({"context": "x", "multi_turns": [{"input": "y"}]}, "input and answer"),
        ({"context": "x", "multi_turns": [{"input": "y", "answer": " "}]}, "not blank"),
    ],
)
def test_what_is_no_record_is_refused(fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        record_of(fields, "here")


def test_numbers_and_several_answers() -> None:
    turns = [{"input": "largest?", "answer": 9}, {"input": "which?", "answer": ["a", "b"]}]
    record = record_of({"id": 4, "context": [1, 9], "multi_turns": turns}, "here")
    assert record == Record("4", "[1, 9]", (Turn("largest?", ("9",)), Turn("which?", ("a", "b"))))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no scbench_kv\.jsonl"):
        read_records("scbench_kv", tmp_path)
    (tmp_path / "scbench_kv.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one record"):
        read_records("scbench_kv", tmp_path)
    (tmp_path / "scbench_kv.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1"):
        read_records("scbench_kv", tmp_path)
    lines = [
        json.dumps({"context": str(number), "multi_turns": [{"input": "x", "answer": "y"}]}) for number in range(3)
    ]
    (tmp_path / "scbench_kv.jsonl").write_text("\n".join(lines))
    assert [record.context for record in read_records("scbench_kv", tmp_path, 2)] == ["0", "1"]
    with pytest.raises(ValueError, match="did you mean"):
        task_named("scbench_kw")
