"""Paired comparisons: p-values against plain enumeration, calibration, pairing, and what is refused."""

import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from report_folders import Row, edit, press, question_rows, window_rows, write_run

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report import Run, compare, comparison_text, load_runs
from pikv_hf.eval.report.paired import RESAMPLES, Array, bootstrap_interval, holm, sign_flip_p

pytestmark = pytest.mark.slow

#: Exactly representable, so that enumeration and scipy see the same ties.
SCORES = st.sampled_from([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0])


def arrays(*tasks: list[float]) -> list[Array]:
    return [np.array(task, dtype=np.float64) for task in tasks]


def enumerated_p(tasks: list[list[float]]) -> float:
    """Share of all sign flips, zeros included, whose mean of means is as far from 0 as the one seen."""

    def statistic(flipped: list[float]) -> float:
        rest = iter(flipped)
        return statistics.fmean([statistics.fmean([next(rest) for _ in task]) for task in tasks])

    values = [value for task in tasks for value in task]
    seen = abs(statistic(values))
    flips = [
        abs(statistic([sign * value for sign, value in zip(signs, values, strict=True)])) >= seen - 1e-12
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    return sum(flips) / len(flips)


def slow_holm(p_values: list[float]) -> list[float]:
    """By definition: step through the ranks, and no corrected value is below one of a smaller p-value."""
    ranked = sorted(p_values)
    stepped = [min(1.0, (len(ranked) - rank) * value) for rank, value in enumerate(ranked)]
    return [max(stepped[: ranked.index(value) + ranked.count(value)]) for value in p_values]


def pair(tmp_path: Path, a: list[Row], b: list[Row], **changes: object) -> tuple[Run, Run]:
    folders = [write_run(tmp_path / "a", "A", a), write_run(tmp_path / "b", "B", b, **changes)]
    one, other = load_runs(folders)
    return one, other


def scored(*tasks: tuple[str, list[float]]) -> list[Row]:
    """Rows with these scores by task."""
    return [
        {**row, "score": score}
        for task, scores in tasks
        for row, score in zip(question_rows([task], len(scores), wrong=0), scores, strict=True)
    ]


class TestStatistics:
    @given(
        st.lists(st.lists(SCORES, min_size=1, max_size=4), min_size=1, max_size=3).filter(
            lambda t: sum(map(len, t)) < 10
        )
    )
    @example([[1.0]])
    @example([[0.0, 0.0]])
    @example([[0.5, 0.5, 0.5]])
    @example([[1.0, -1.0]])
    @settings(max_examples=40, deadline=None)
    def test_p_value_is_that_of_all_sign_flips(self, tasks: list[list[float]]) -> None:
        assert sign_flip_p(arrays(*tasks)) == pytest.approx(enumerated_p(tasks))

    def test_hand_computed(self) -> None:
        assert sign_flip_p(arrays([1, 1, 1, 1, 1, 0, 0])) == 2 / 2**5
        assert sign_flip_p(arrays([1, 1, 1, -1])) == 10 / 2**4
        assert sign_flip_p(arrays([0, 0, 0])) == 1

    def test_random_flips_agree_with_the_binomial_distribution(self) -> None:
        differences = [1.0] * 14 + [-1.0] * 6
        exact = 2 * sum(math.comb(20, k) for k in range(14, 21)) / 2**20
        error = math.sqrt(exact * (1 - exact) / RESAMPLES)
        assert sign_flip_p(arrays(differences), seed=3) == pytest.approx(exact, abs=4 * 2 * error)

    def test_false_positives_are_as_many_as_promised(self) -> None:
        rng = np.random.default_rng(0)
        trials, found = 400, 0
        for _ in range(trials):
            tasks = [rng.normal(size=size) * scale for size, scale in ((7, 1.0), (4, 5.0))]
            found += sign_flip_p(tasks) <= 0.05
        spread = math.sqrt(0.05 * 0.95 / trials)
        assert abs(found / trials - 0.05) < 3 * spread

    def test_a_real_difference_is_found(self) -> None:
        rng = np.random.default_rng(1)
        assert sign_flip_p([rng.normal(1.0, 1.0, 40), rng.normal(1.0, 1.0, 10)]) <= 0.001

    def test_intervals_hold_the_truth_as_often_as_promised(self) -> None:
        rng = np.random.default_rng(2)
        held = [
            low <= 0.5 <= high
            for low, high in (bootstrap_interval([rng.normal(0.5, 1, 40), rng.normal(0.5, 2, 60)]) for _ in range(150))
        ]
        # The percentile interval of a mean of 40 to 60 values is a little short of 95%.
        assert 0.88 <= statistics.fmean(held) <= 0.99

    @pytest.mark.parametrize("value", [0.0, -0.25, 100.0])
    def test_interval_of_a_constant_is_a_point(self, value: float) -> None:
        assert bootstrap_interval(arrays([value] * 5, [value])) == (value, value)

    def test_interval_has_the_normal_width(self) -> None:
        values = np.random.default_rng(3).normal(size=400)
        low, high = bootstrap_interval([values])
        assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.06)

    def test_interval_resamples_within_tasks(self) -> None:
        assert bootstrap_interval(arrays([0.0] * 4, [10.0] * 9)) == (5.0, 5.0)

    def test_holm_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
        assert holm([0.9, 0.8]) == (1.0, 1.0)
        assert holm([]) == ()

    @given(st.lists(st.sampled_from([0.001, 0.01, 0.02, 0.05, 0.3, 1.0]), max_size=8))
    @settings(max_examples=100, deadline=None)
    def test_holm_is_its_definition(self, p_values: list[float]) -> None:
        assert list(holm(p_values)) == pytest.approx(slow_holm(p_values))


class TestCompare:
    def test_differences_by_hand(self, tmp_path: Path) -> None:
        a, b = pair(
            tmp_path,
            scored(("x", [0, 0, 0, 1]), ("y", [1, 1])),
            scored(("x", [1, 1, 0, 0]), ("y", [1, 0.5])),
        )
        found = compare(a, b)
        x, y = found.tasks
        assert (x.task, x.samples, x.mean_a, x.mean_b, x.mean) == ("x", 4, 25, 50, 25)
        assert (x.wins, x.losses, x.ties) == (2, 1, 1)
        assert x.p_value == enumerated_p([[1, 1, 0, -1]]) == 1
        assert (y.mean, y.wins, y.losses, y.ties) == (-25, 0, 1, 1)
        assert (found.overall.mean, found.overall.samples, found.unit) == (0, 6, "points")
        assert (found.overall.wins, found.overall.losses, found.overall.ties) == (2, 2, 2)
        assert found.overall.p_value == 1

    def test_tasks_weigh_alike_however_many_samples(self, tmp_path: Path) -> None:
        a, b = pair(tmp_path, scored(("x", [0] * 30), ("y", [0])), scored(("x", [0] * 30), ("y", [1])))
        assert compare(a, b).overall.mean == 50

    def test_holm_is_over_tasks(self, tmp_path: Path) -> None:
        a, b = pair(tmp_path, scored(("x", [0] * 8), ("y", [0] * 6)), scored(("x", [1] * 8), ("y", [1] * 6)))
        found = compare(a, b)
        assert [task.p_value for task in found.tasks] == [2 / 2**8, 2 / 2**6]
        assert [task.p_holm for task in found.tasks] == [4 / 2**8, 2 / 2**6]
        assert (found.tasks[0].low, found.tasks[0].high) == (100, 100)

    def test_a_run_equals_itself(self, tmp_path: Path) -> None:
        a, b = pair(tmp_path, question_rows(), question_rows())
        found = compare(a, b)
        for each in (found.overall, *found.tasks):
            assert (each.mean, each.low, each.high, each.p_value, each.p_holm) == (0, 0, 0, 1, 1)
            assert (each.wins, each.losses, each.texts_differ) == (0, 0, 0)
        assert {ratio for name, ratio in found.cost_ratios if name != "cuda_peak_bytes"} == {1.0}

    def test_rows_pair_by_id_not_by_place(self, tmp_path: Path) -> None:
        rows = scored(("x", [0, 0.25, 0.5, 1]))
        a, b = pair(tmp_path, rows, rows[::-1])
        assert compare(a, b).overall.ties == 4

    def test_texts_and_costs(self, tmp_path: Path) -> None:
        other = question_rows(answer="something else")
        a, b = pair(tmp_path, question_rows(), other, **press("SnapKVPress", 0.75, speed=2.0))
        found = compare(a, b)
        assert (found.overall.texts_differ, found.overall.ties) == (4, 20)
        ratios = dict(found.cost_ratios)
        assert (ratios["kv_share_prefill"], ratios["decode_tokens_per_s"]) == (0.25, 2.0)
        assert ratios["cuda_peak_bytes"] is None

    def test_seed_fixes_the_result(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        scores = [list(rng.choice([0, 0.25, 0.5, 1], 40)) for _ in range(2)]
        a, b = pair(tmp_path, scored(("x", scores[0])), scored(("x", scores[1])))
        assert compare(a, b) == compare(a, b)
        assert compare(a, b, seed=1) != compare(a, b)

    def test_lower_perplexity_wins(self, tmp_path: Path) -> None:
        measure = {"name": "perplexity", "unit": "", "higher_is_better": False}
        better = [{**row, "score": row["score"] - 0.5} for row in window_rows()]
        write_run(tmp_path / "a", "A", window_rows(), measure=measure)
        write_run(tmp_path / "b", "B", better, measure=measure)
        a, b = load_runs([tmp_path])
        found = compare(a, b)
        assert (found.overall.mean, found.overall.wins, found.unit) == (-0.5, 6, "nats per token")
        assert found.overall.p_value == 2 / 2**6

    def test_different_samples_are_refused_unless_allowed(self, tmp_path: Path) -> None:
        a, b = pair(tmp_path, question_rows(), question_rows(samples=8))
        with pytest.raises(InputError, match=r"sample ids differ: 20 in .*a, 16 in .*b, 16 in both"):
            compare(a, b)
        found = compare(a, b, allow_partial=True)
        assert (found.overall.samples, found.only_a, found.only_b) == (16, 4, 0)
        assert "Partial: 4 samples of A alone and 0 of B alone are left out." in comparison_text(found)

    def test_nothing_shared_is_refused_always(self, tmp_path: Path) -> None:
        a, b = pair(tmp_path, question_rows(["x"]), question_rows(["y"]))
        with pytest.raises(InputError, match=r"share no sample ids: 10 in .*a, 10 in .*b, 0 in both"):
            compare(a, b, allow_partial=True)

    def test_other_references_are_refused(self, tmp_path: Path) -> None:
        rows = question_rows()
        changed = [{**row, "answer": '["other"]'} if row["id"] == "vt-0001" else row for row in rows]
        a, b = pair(tmp_path, rows, changed)
        with pytest.raises(InputError, match=r"""references of 1 samples differ, first of id vt-0001: .*1001.*other"""):
            compare(a, b, allow_partial=True)

    @pytest.mark.parametrize("field", ["dataset", "data_dir"])
    def test_other_data_sets_are_refused(self, tmp_path: Path, field: str) -> None:
        a, b = pair(tmp_path, question_rows(), question_rows(), **{field: "other"})
        with pytest.raises(InputError, match=rf"{field} is '.*' in .*a and 'other' in .*b, expected the same"):
            compare(a, b)

    def test_other_measures_are_refused(self, tmp_path: Path) -> None:
        a, b = pair(
            tmp_path, question_rows(), question_rows(), measure={"name": "f1", "unit": "%", "higher_is_better": True}
        )
        with pytest.raises(InputError, match=r"a measures score and .*b f1"):
            compare(a, b)


class TestText:
    def test_table(self, tmp_path: Path) -> None:
        a, b = pair(tmp_path, scored(("x", [0] * 8)), scored(("x", [1] * 8)), share=0.5)
        lines = comparison_text(compare(a, b)).splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        expected = ["8", "0.0", "100.0", "+100.00", "+100.00 to +100.00", "0.0078"]
        assert rows[2] == ["overall", *expected, "–", "8", "0", "0", "0"]
        assert rows[3] == ["x", *expected, "0.0078", "8", "0", "0", "0"]
        assert ["KV bytes after prefill", "0.50x"] in rows
        assert ["peak memory of the GPU", "–"] in rows

    def test_labels_are_escaped(self, tmp_path: Path) -> None:
        a, b = pair(tmp_path, question_rows(), question_rows())
        edit(b.folder / "summary.json", "label", "<b>|")
        assert "B: &lt;b&gt;\\|" in comparison_text(compare(a, load_runs([b.folder])[0]))
