"""LongBench: the table of sets, prompts in three parts, data checked by line, truncation, and the bundled samples."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pikv_hf.eval.metrics import METRICS
from pikv_hf.eval.reference.tokenizer import build_tokenizer
from pikv_hf.eval.tasks.longbench import SETS, SETS_E, bucket, bundled_sample, load, records, score, truncate_middle
from pikv_hf.eval.tasks.longbench.fit import fit, frame
from pikv_hf.eval.tasks.longbench.templates import PROMPTS, parse_template
from pikv_hf.eval.tasks.longbench.truncate import count_tokens
from pikv_hf.eval.tasks.sample import EvalSample

METRIC_OF = {
    "qa_f1": ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
    "qa_f1_zh": ("multifieldqa_zh",),
    "rouge_l": ("gov_report", "qmsum", "multi_news", "samsum"),
    "rouge_l_zh": ("dureader", "vcsum"),
    "classification": ("trec", "lsht"),
    "retrieval_en": ("passage_retrieval_en",),
    "retrieval_zh": ("passage_retrieval_zh",),
    "count": ("passage_count",),
    "edit_similarity": ("lcc", "repobench-p"),
}
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")

RECORD = {
    "input": "Who steers?",
    "context": "Odile steers the ferry.",
    "answers": ["Odile"],
    "length": 7,
    "dataset": "narrativeqa",
    "language": "en",
    "all_classes": None,
    "_id": "0f",
}


def prompt_of(sample: EvalSample) -> str:
    """The whole prompt as kvpress's pipeline puts it together for a tokenizer without chat template."""
    return f"{sample.context}{sample.question}\n{sample.answer_prefix}"


def write_lines(folder: Path, *entries: Any, name: str = "narrativeqa.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return folder


def write_prompts(path: Path, **prompts: Any) -> Path:
    path.write_text(json.dumps(prompts), encoding="utf-8")
    return path


class TestSets:
    def test_twenty_one_sets_of_which_thirteen_are_in_e(self) -> None:
        assert len(SETS) == 21
        only_full = {"narrativeqa", "musique", "qmsum", "multifieldqa_zh", "dureader", "vcsum", "lsht"}
        assert set(SETS) - set(SETS_E) == only_full | {"passage_retrieval_zh"}
        assert len(SETS_E) == 13
        assert all(SETS_E[name] is SETS[name] for name in SETS_E)

    def test_every_set_has_its_metric(self) -> None:
        assert {name: entry.metric for name, entry in SETS.items()} == {
            name: metric for metric, names in METRIC_OF.items() for name in names
        }
        assert set(METRIC_OF) <= set(METRICS)

    def test_answers_are_limited_by_kind_of_task(self) -> None:
        limits = {name: entry.max_new_tokens for name, entry in SETS.items()}
        assert {limits[name] for name in ("gov_report", "qmsum", "multi_news", "vcsum")} == {512}
        assert {limits[name] for name in ("narrativeqa", "qasper", "dureader", "samsum")} == {128}
        assert {limits[name] for name in METRIC_OF["classification"] + METRIC_OF["edit_similarity"]} == {64}
        assert {name for name in limits if limits[name] == 32} == {
            *("hotpotqa", "2wikimqa", "musique", "triviaqa"),
            *("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
        }

    def test_first_line_rule_holds_for_the_few_shot_sets(self) -> None:
        assert tuple(name for name, entry in SETS.items() if entry.few_shot) == FEW_SHOT

    @pytest.mark.parametrize(
        ("names", "e", "message"),
        [
            (["naratifqa"], False, r"unknown LongBench set 'naratifqa', did you mean 'narrativeqa'\?"),
            (["lsht"], True, "unknown LongBench-E set 'lsht'"),
            ([], False, "expected a list of LongBench sets"),
            ("lcc", False, "expected a list of LongBench sets, got 'lcc'"),
            (["lcc", "lcc"], False, "may be given once, got lcc, lcc"),
        ],
    )
    def test_wrong_names_are_refused(self, names: list[str], e: bool, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load(names, e=e, data_dir=bundled_sample())


class TestBundled:
    @pytest.mark.parametrize(("e", "names"), [(False, SETS), (True, SETS_E)])
    def test_a_right_answer_scores_one_in_every_set(self, e: bool, names: dict[str, Any]) -> None:
        samples = load(names, data_dir=bundled_sample(), e=e)
        assert {sample.task for sample in samples} == set(names)
        for sample in samples:
            for answer in sample.answers:
                [(metric, value)] = score(sample, answer).items()
                assert metric == SETS[sample.task].metric
                assert value == pytest.approx(1, abs=1e-8), sample.id

    @pytest.mark.parametrize("name", SETS)
    def test_two_or_more_samples_with_different_ids(self, name: str) -> None:
        samples = load([name], data_dir=bundled_sample())
        assert [sample.id for sample in samples] == [f"{name}-{index:04d}" for index in range(len(samples))]
        assert len({sample.extra["source_id"] for sample in samples}) == len(samples) >= 2

    @pytest.mark.parametrize("name", SETS)
    def test_context_never_holds_the_question(self, name: str) -> None:
        for sample in load([name], data_dir=bundled_sample()):
            assert not sample.question or sample.question not in sample.context

    def test_length_is_counted_as_in_the_benchmark(self) -> None:
        for file in sorted(bundled_sample().glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                fields = json.loads(line)
                texts = [fields["context"], fields["input"], *fields["answers"]]
                count = len if fields["language"] == "zh" else lambda text: len(text.split())
                assert fields["length"] == sum(map(count, texts)), file.name

    def test_e_has_samples_in_every_bucket(self) -> None:
        samples = load(["passage_count", "hotpotqa"], data_dir=bundled_sample(), e=True)
        assert {bucket(sample) for sample in samples} == {"0-4k", "4-8k", "8k+"}

    def test_limit_takes_the_first_of_each_set(self) -> None:
        samples = load(["lcc", "trec"], data_dir=bundled_sample(), limit=1)
        assert [sample.id for sample in samples] == ["lcc-0000", "trec-0000"]

    def test_fields_come_from_table_and_data(self) -> None:
        sample = load(["trec"], data_dir=bundled_sample(), limit=1)[0]
        assert (sample.max_new_tokens, sample.answer_prefix, sample.answers) == (64, "Type:", ("Person",))
        assert sample.extra["language"] == "en"
        assert "Person" in sample.extra["all_classes"]
        assert json.loads(json.dumps(dict(sample.extra))) == sample.extra


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


def sample_of(task: str, answers: tuple[str, ...], length: int = 0, classes: list[str] | None = None) -> EvalSample:
    return EvalSample("x", task, "", "", "", answers, 1, length, {"all_classes": classes})


class TestScore:
    @pytest.mark.parametrize(
        ("length", "name"),
        [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (90000, "8k+")],
    )
    def test_bucket_edges(self, length: int, name: str) -> None:
        assert bucket(sample_of("lcc", ("x",), length)) == name

    def test_few_shot_answers_end_with_their_first_line(self) -> None:
        sample = sample_of("triviaqa", ("grey harbour",))
        assert score(sample, "\n \n grey harbour\nQuestion: what next?") == {"qa_f1": 1}
        assert score(sample, "grey\nharbour") == {"qa_f1": pytest.approx(2 / 3)}

    def test_other_answers_count_in_full(self) -> None:
        assert score(sample_of("hotpotqa", ("grey harbour",)), "grey\nharbour") == {"qa_f1": 1}

    def test_labels_reach_the_metric(self) -> None:
        sample = sample_of("trec", ("Date",), classes=["Date", "Place"])
        assert score(sample, " Date or Place") == {"classification": 0.5}

    def test_indentation_of_code_counts(self) -> None:
        sample = sample_of("lcc", ("    return x",))
        assert score(sample, "\n    return x\n") == {"edit_similarity": 1}
        assert score(sample, "return x")["edit_similarity"] == 0.8  # 2 x 8 of 20


BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CORPUS = [(bundled_sample() / f"{file}.jsonl").read_text(encoding="utf-8") for file in ("qmsum", "vcsum", "lcc")]


def byte_level(merges: bool) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, with or without merges learnt from English, Chinese and code."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": BYTES, "show_progress": False, "special_tokens": ["<s>"]}
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=900 if merges else 257, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if merges else None)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: words with a marked beginning; what is not in the vocabulary becomes bytes."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *letters,
        "th",
        "▁th",
        "▁the",
        "the",
        "会",
        "议",
    ]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


class SlowBytes(PreTrainedTokenizer):
    """One token per byte, in Python; a cut character is decoded as the replacement character."""

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return bytes(ord(token) for token in tokens).decode(errors="replace")


TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {
    "words": build_tokenizer(),
    "bytes": byte_level(merges=False),
    "byte-level BPE": byte_level(merges=True),
    "byte-fallback BPE": byte_fallback(),
    "ByT5": ByT5Tokenizer(),
    "slow bytes": SlowBytes(),
}
TEXTS = st.text("abc the ,.\n12会议记录🙂é", max_size=60) | st.text(max_size=30)


class TestTruncation:
    @pytest.mark.parametrize("name", TOKENIZERS)
    @given(text=TEXTS, limit=st.integers(0, 40), following=st.integers(-5, 60))
    @settings(max_examples=120)
    def test_never_over_the_limit(self, name: str, text: str, limit: int, following: int) -> None:
        tokenizer = TOKENIZERS[name]
        shortened = truncate_middle(text, tokenizer, limit, following)
        assert count_tokens(shortened, tokenizer) <= limit
        assert (shortened == text) or count_tokens(text, tokenizer) > limit

    @pytest.mark.parametrize("name", TOKENIZERS)
    @given(text=st.text("the会议记录🙂é ", max_size=60), limit=st.integers(1, 40))
    @settings(max_examples=60)
    def test_a_beginning_and_an_end_of_whole_characters(self, name: str, text: str, limit: int) -> None:
        shortened = truncate_middle(text, TOKENIZERS[name], limit)
        assert any(
            text.startswith(shortened[:cut]) and text.endswith(shortened[cut:]) for cut in range(len(shortened) + 1)
        )

    @pytest.mark.parametrize("name", ["bytes", "ByT5", "slow bytes"])
    def test_first_and_last_half(self, name: str) -> None:
        tokenizer = TOKENIZERS[name]
        assert truncate_middle("0123456789", tokenizer, 6) == "012789"
        assert truncate_middle("0123456789", tokenizer, 6, following=4) == "012349"
        assert truncate_middle("0123456789", tokenizer, 6, following=-4) == "056789"
        assert truncate_middle("0123456789", tokenizer, 6, following=100) == "012345"
        assert truncate_middle("0123456789", tokenizer, 0) == ""

    @pytest.mark.parametrize("name", ["bytes", "ByT5", "slow bytes"])
    def test_a_character_is_not_cut_in_pieces(self, name: str) -> None:
        # Three bytes each: two of the four bytes on each side make no character.
        assert truncate_middle("会议记录", TOKENIZERS[name], 8) == "会录"
        # Here the two sides hold pieces of the same character.
        assert truncate_middle("a🙂b", TOKENIZERS[name], 4) == "ab"

    def test_most_of_the_limit_is_used(self) -> None:
        text = CORPUS[0][:1000]
        for name, tokenizer in TOKENIZERS.items():
            assert count_tokens(truncate_middle(text, tokenizer, 100), tokenizer) >= 95, name

    def test_a_negative_limit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="max_tokens must be at least 0, got -1"):
            truncate_middle("x", TOKENIZERS["bytes"], -1)


def with_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = "[user] {{ messages[0].content }}\n[model] "
    return tokenizer


class TestFit:
    @pytest.mark.parametrize("limit", [60, 81, 200])
    def test_the_cut_is_where_it_would_be_in_the_whole_prompt(self, limit: int) -> None:
        tokenizer = TOKENIZERS["bytes"]
        sample = EvalSample("x-0000", "lcc", "0123456789" * 20, "Question: who?", "Answer:", ("x",), 1, 0)
        whole = prompt_of(sample)
        first = limit // 2
        assert prompt_of(fit(sample, tokenizer, limit)) == whole[:first] + whole[first - limit :]

    # ByT5 takes seconds to decode a text of this length.
    @pytest.mark.parametrize("name", sorted(TOKENIZERS.keys() - {"ByT5"}))
    @pytest.mark.parametrize("limit", [120, 333])
    def test_the_pipelines_prompt_fits(self, name: str, limit: int) -> None:
        tokenizer = TOKENIZERS[name]
        for sample in load(["vcsum", "trec", "lcc", "repobench-p"], data_dir=bundled_sample(), limit=1):
            before, between = frame(tokenizer)
            after = count_tokens(sample.question + between + sample.answer_prefix, tokenizer)
            if limit <= after + 1:
                with pytest.raises(ValueError, match=f"{sample.id}: max_context of {limit} tokens leaves none"):
                    fit(sample, tokenizer, limit)
                continue
            fitted = fit(sample, tokenizer, limit)
            assert count_tokens(before + fitted.context, tokenizer) + after <= limit
            assert dataclasses.replace(fitted, context=sample.context) == sample

    def test_load_cuts_only_what_is_too_long(self) -> None:
        tokenizer = TOKENIZERS["byte-level BPE"]
        plain = load(["hotpotqa"], data_dir=bundled_sample(), e=True)
        fitted = load(["hotpotqa"], data_dir=bundled_sample(), e=True, max_context=2000, tokenizer=tokenizer)
        assert [one == other for one, other in zip(plain, fitted, strict=True)] == [True, True, True, False, False]
        assert all(count_tokens(prompt_of(sample), tokenizer) < 2000 for sample in fitted)

    def test_a_chat_template_counts(self) -> None:
        tokenizer = with_chat(byte_level(merges=False))
        assert frame(tokenizer) == ("[user] ", "\n[model] ")
        sample = EvalSample("x-0000", "lcc", "0123456789" * 20, "who?", "It is", ("x",), 1, 0)
        fitted = fit(sample, tokenizer, 50)
        whole = [f"[user] {one.context}who?\n[model] It is" for one in (sample, fitted)]
        assert whole[1] == whole[0][:25] + whole[0][-25:]
        with pytest.raises(ValueError, match="max_context of 25 tokens leaves none for the context, the rest has 25"):
            fit(sample, tokenizer, 25)

    def test_tokens_at_the_border_of_the_frame_count_as_they_are_there(self) -> None:
        # Apart "ab" is one token and "cd" too; together they are "a", "bc" and "d".
        vocabulary = {token: index for index, token in enumerate(["a", "b", "c", "d", "bc", "ab", "cd"])}
        model = models.BPE(vocabulary, [("b", "c"), ("a", "b"), ("c", "d")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
        tokenizer.chat_template = "ab{{ messages[0].content }}cd"
        fitted = fit(EvalSample("x-0000", "lcc", "cd" * 20, "", "", ("x",), 1, 0), tokenizer, 10)
        assert fitted.context == "cd" * 7
        assert count_tokens("ab" + fitted.context, tokenizer) + count_tokens("cd", tokenizer) == 10

    def test_a_tokenizer_is_needed_to_count(self) -> None:
        with pytest.raises(ValueError, match="max_context of 100 needs a tokenizer"):
            load(["lcc"], data_dir=bundled_sample(), max_context=100)
