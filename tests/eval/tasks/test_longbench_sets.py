"""LongBench: the table of sets, the bundled samples, and scores."""

import json
from typing import Any

import pytest

from pikv_hf.eval.metrics import METRICS
from pikv_hf.eval.tasks.longbench import SETS, SETS_E, bucket, bundled_sample, load, score
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
