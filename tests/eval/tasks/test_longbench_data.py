"""LongBench: prompts in three parts, and data checked line by line."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from longbench_records import RECORD, prompt_of, write_lines, write_prompts

from pikv_hf.eval.tasks.longbench import SETS, SETS_E, bundled_sample, load, records
from pikv_hf.eval.tasks.longbench.templates import PROMPTS, parse_template


class TestPrompts:
    """Prompts of an invented file in the official form."""

    @pytest.mark.parametrize(
        ("name", "template", "text", "expected"),
        [
            # The label goes with the question; the newline before the cue is the pipeline's.
            ("hotpotqa", "Read.\n{context}\n\nReply.\n\nQuestion: {input}\nAnswer:", "Who?",
             ("Read.\nCTX\n\nReply.\n\n", "Question: Who?", "Answer:")),
            # Of two newlines one stays.
            ("qasper", "Read.\n{context}\n\nReply.\n\nQuestion: {input}\n\nAnswer:", "Who?",
             ("Read.\nCTX\n\nReply.\n\n", "Question: Who?\n", "Answer:")),
            # Text after the input belongs to the question.
            ("passage_retrieval_en", "Read.\n\n{context}\n\nSummary:\n\n{input}\n\nWhich?\n\nThe answer is: ", "Bees.",
             ("Read.\n\nCTX\n\nSummary:\n\n", "Bees.\n\nWhich?\n", "The answer is: ")),
            # Without an input, the repeated instruction is the question.
            ("gov_report", "Read.\n{context}\n\nNow sum up.\n\nSummary:", "",
             ("Read.\nCTX\n\n", "Now sum up.\n", "Summary:")),
            # Nothing is left for the question; the newline is taken from the context.
            ("vcsum", "Read.\n{context}\n\n会议总结：", "", ("Read.\nCTX\n", "", "会议总结：")),
            # A few-shot input ends with the cue, with or without a blank.
            ("samsum", "Retell.\n\n{context}\n\n{input}", "Dialogue: Summary: no\nSummary: ",
             ("Retell.\n\nCTX\n\n", "Dialogue: Summary: no", "Summary: ")),
            ("trec", "Type.\n{context}\n{input}", "Question: Why?\nType:", ("Type.\nCTX\n", "Question: Why?", "Type:")),
            # Context and input in one line are cut between them.
            ("repobench-p", "Go on.\n{context}{input}Next line of code:\n", "def f():\n",
             ("Go on.\nCTX", "def f():", "Next line of code:\n")),
        ],
    )  # fmt: skip
    def test_cut_in_three_and_joined_again(
        self, tmp_path: Path, name: str, template: str, text: str, expected: tuple[str, str, str]
    ) -> None:
        classes = ["x"] if SETS[name].metric == "classification" else None
        fields = RECORD | {"context": "CTX", "input": text, "dataset": name, "all_classes": classes}
        data = write_lines(tmp_path / "data", fields, name=f"{name}.jsonl")
        [sample] = load([name], data_dir=data, prompts=write_prompts(tmp_path / "p.json", **{name: template}))
        assert (sample.context, sample.question, sample.answer_prefix) == expected
        assert prompt_of(sample) == template.format(context="CTX", input=text)

    def test_code_that_ends_with_a_newline_gives_it_up(self) -> None:
        template = parse_template("Go on.\n{context}Next line of code:\n", SETS["lcc"], "p.json")
        assert template.fill("x = 1\n", "", SETS["lcc"]).context == "Go on.\nx = 1"

    @pytest.mark.parametrize(
        ("name", "context", "text"), [("lcc", "x = 1", ""), ("repobench-p", "# a\n", "x = 1"), ("trec", "c", "Why?")]
    )
    def test_without_a_newline_before_the_cue_the_pipelines_is_added(self, name: str, context: str, text: str) -> None:
        prompt = json.loads(PROMPTS.read_text(encoding="utf-8"))[name]
        parts = parse_template(prompt, SETS[name], "p.json").fill(context, text, SETS[name])
        cue = "" if name == "trec" else SETS[name].cue
        want = prompt.format(context=context, input=text).removesuffix(cue)
        assert parts.context + parts.question + "\n" + parts.answer_prefix == f"{want}\n{cue}"

    @pytest.mark.parametrize("name", SETS)
    @given(context=st.text("ab{}\n问", max_size=12), text=st.text("cd{}\n答", max_size=12))
    @settings(max_examples=20)
    def test_our_prompts_joined_are_the_template_filled_in(self, name: str, context: str, text: str) -> None:
        prompt = json.loads(PROMPTS.read_text(encoding="utf-8"))[name]
        entry = SETS[name]
        text = f"§{text}\n{entry.cue}" if entry.few_shot else f"§{text}"
        parts = parse_template(prompt, entry, "p.json").fill(context, text, entry)
        want, joined = prompt.format(context=context, input=text), f"{parts.question}\n{parts.answer_prefix}"
        assert parts.answer_prefix == entry.cue
        # Up to the newline that code may lack before the cue.
        code = entry.metric == "edit_similarity"
        assert parts.context + joined in ([want, f"{want.removesuffix(entry.cue)}\n{entry.cue}"] if code else [want])
        assert "§" not in parts.context

    def test_braces_in_the_data_are_text(self) -> None:
        template = parse_template("{{x}} {context}\nQuestion: {input}\nAnswer:", SETS["hotpotqa"], "p.json")
        parts = template.fill("{input}", "{context}", SETS["hotpotqa"])
        assert (parts.context, parts.question) == ("{x} {input}\n", "Question: {context}")

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("Read. Question: {input}\nAnswer:", r"expected \{context\} and then .* got the fields \['input'\]"),
            ("{input} {context}\nAnswer:", "got the fields"),
            ("{context} {context}\nAnswer:", "got the fields"),
            ("{context!r}\nAnswer:", "got the fields"),
            ("{context} {answers}\nAnswer:", r"got the fields \['context', 'answers'\]"),
            ("{context\nAnswer:", "p.json, hotpotqa: expected"),
            ("{context}\n{input}\nReply:", "expected 'Answer:' at the end, got '\\\\nReply:'"),
            (7, "expected a template for 'hotpotqa', got 7"),
            (None, "expected a template for 'hotpotqa', got None"),
        ],
    )
    def test_a_template_that_cannot_be_cut_is_refused(self, tmp_path: Path, template: Any, message: str) -> None:
        prompts = write_prompts(tmp_path / "p.json", hotpotqa=template)
        with pytest.raises(ValueError, match=message):
            load(["hotpotqa"], data_dir=bundled_sample(), prompts=prompts)

    def test_a_few_shot_template_ends_with_the_input(self) -> None:
        with pytest.raises(ValueError, match=r"expected '\{input\}' at the end"):
            parse_template("{context}\n{input}\nType:", SETS["trec"], "p.json")

    def test_files_that_are_no_prompts_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no prompt file .*none\.json"):
            load(["lcc"], data_dir=bundled_sample(), prompts=tmp_path / "none.json")
        (tmp_path / "p.json").write_text("{\n'lcc'")
        with pytest.raises(ValueError, match=r"p\.json: expected a JSON object from set to template, .*line 2"):
            load(["lcc"], data_dir=bundled_sample(), prompts=tmp_path / "p.json")
        (tmp_path / "p.json").write_text("[]")
        with pytest.raises(ValueError, match="expected a template for 'lcc'"):
            load(["lcc"], data_dir=bundled_sample(), prompts=tmp_path / "p.json")


class TestData:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"answers": []}, r"expected at least one answer that is not blank, got \[\]"),
            ({"answers": ["", " "]}, "expected at least one answer that is not blank"),
            ({"answers": "Odile"}, "answers must be a list of texts, got 'Odile'"),
            ({"answers": [7]}, r"answers must be a list of texts, got \[7\]"),
            ({"answers": None}, "answers must be a list of texts, got None"),
            ({"context": None}, "context must be a text, got None"),
            ({"input": 3}, "input must be a text, got 3"),
            ({"length": "7"}, "length must be a whole number, got '7'"),
            ({"length": True}, "length must be a whole number, got True"),
            ({"length": -1}, "length must be a whole number, got -1"),
            ({"all_classes": "x"}, "all_classes must be a list of texts, got 'x'"),
            ({"dataset": "musique"}, "expected dataset 'narrativeqa', got 'musique'"),
        ],
    )
    def test_a_wrong_value_is_named_with_file_and_line(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        data = write_lines(tmp_path, RECORD, RECORD | change)
        with pytest.raises(ValueError, match=rf"narrativeqa\.jsonl, line 2: {message}"):
            load(["narrativeqa"], data_dir=data)

    @pytest.mark.parametrize("key", RECORD)
    def test_a_missing_key_is_named(self, tmp_path: Path, key: str) -> None:
        data = write_lines(tmp_path, {name: value for name, value in RECORD.items() if name != key})
        with pytest.raises(ValueError, match=rf"line 1: expected the keys .*, missing {key}$"):
            load(["narrativeqa"], data_dir=data)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b"{oops", "line 2: expected a JSON object, .* at character 1"),
            (b"", "line 2: expected a JSON object"),
            (b"[1]", "line 2: expected a JSON object, got list"),
            (b'{"input": "\xff"}', "line 2: expected UTF-8, got byte 0xff at 11"),
        ],
    )
    def test_an_unreadable_line_is_named(self, tmp_path: Path, line: bytes, message: str) -> None:
        good = json.dumps(RECORD).encode()
        (tmp_path / "narrativeqa.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
        with pytest.raises(ValueError, match=message):
            load(["narrativeqa"], data_dir=tmp_path)

    def test_labels_are_needed_where_they_are_scored(self, tmp_path: Path) -> None:
        data = write_lines(tmp_path, RECORD | {"dataset": "trec"}, name="trec.jsonl")
        with pytest.raises(ValueError, match=r"trec\.jsonl, line 1: trec needs all_classes, got None"):
            load(["trec"], data_dir=data)

    def test_separators_inside_a_text_end_no_line(self, tmp_path: Path) -> None:
        fields = RECORD | {"context": "a\u2028b\x85c"}
        text = json.dumps(fields, ensure_ascii=False)
        (tmp_path / "narrativeqa.jsonl").write_text(f"{text}\r\n{text}", encoding="utf-8", newline="")
        samples = load(["narrativeqa"], data_dir=tmp_path)
        assert ["a\u2028b\x85c" in sample.context for sample in samples] == [True, True]

    def test_an_empty_or_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=rf"no qasper_e\.jsonl in {tmp_path}"):
            load(["qasper"], data_dir=tmp_path, e=True)
        with pytest.raises(ValueError, match=r"narrativeqa\.jsonl: expected one sample per line, got an empty file"):
            load(["narrativeqa"], data_dir=write_lines(tmp_path))

    def test_e_accepts_both_names_of_a_set(self, tmp_path: Path) -> None:
        lines = [RECORD | {"dataset": name} for name in ("qasper", "qasper_e")]
        samples = load(["qasper"], data_dir=write_lines(tmp_path, *lines, name="qasper_e.jsonl"), e=True)
        assert [sample.id for sample in samples] == ["qasper-0000", "qasper-0001"]

    def test_the_hubs_archive_is_read_like_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for file in bundled_sample().glob("*.jsonl"):
                archive.write(file, f"data/{file.name}")
        monkeypatch.setattr(records, "hf_hub_download", lambda *_, **__: str(tmp_path / "data.zip"))
        for e, names in ((False, SETS), (True, SETS_E)):
            assert load(names, e=e) == load(names, e=e, data_dir=bundled_sample())

    def test_without_network_the_way_out_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # conftest.py keeps the Hub off; an empty cache then leaves nothing to read.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(FileNotFoundError, match=r"cannot get data\.zip of THUDM/LongBench .* --data-dir$") as error:
            load(["lcc"])
        assert "\n" not in str(error.value)

    def test_a_limit_below_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
            load(["lcc"], data_dir=bundled_sample(), limit=0)
