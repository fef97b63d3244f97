"""Many presses from one reading of a prompt keep and answer what each does alone; what was measured is kept."""

import functools
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.runner.memory_meter import stored_bytes
from pikv_hf.eval.runner.protocol import Asker
from pikv_hf.eval.studies.kept_rows import kept
from pikv_hf.eval.studies.presses import equal_bytes_study as study
from pikv_hf.eval.studies.presses.equal_bytes_rows import errors_of, rows_of
from pikv_hf.eval.studies.presses.equal_bytes_sample import FULL, INT4, Method, SampleRunner, check
from pikv_hf.eval.studies.presses.equal_bytes_study import LEFT_OUT, PRESSES, methods_of
from pikv_hf.eval.studies.presses.equal_bytes_table import FILE, MODELS, ceiling_table, equal_bytes_tables, table
from pikv_hf.eval.studies.presses.further_readings import read_further, reads_further
from pikv_hf.eval.studies.presses.one_reading import Kept, Reading, read_once, shares_a_reading
from pikv_hf.eval.studies.presses.paged_presses import LAYOUT
from pikv_hf.eval.tasks import reference
from pikv_hf.integration.kvpress_marks import MARKS

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "eval" / "results"
SHARES = (0.5, 0.125)
SEED = 7
#: Layers of these keep different numbers of tokens, which `DynamicCache` has no mask for.
UNEVEN = {Method("PyramidKVPress", 0.5), Method("ChunkKVPress(SnapKVPress)", 0.125)}
METHODS = methods_of(PRESSES, SHARES)


@functools.cache
def asker() -> Asker:
    return Asker(*load_reference_model())


@functools.cache
def sample(task: str = "niah_multikey_1") -> Any:
    return reference.generate(400, 1, tasks=(task,), seed=3)[0]


@functools.cache
def reading() -> Reading:
    """All presses at once."""
    presses = {method: method.press() for method in METHODS}
    ids = asker().encode(sample()).context
    read = read_once(asker().model, ids, {m: p for m, p in presses.items() if shares_a_reading(p)}, SEED)
    kept = dict(read.kept)
    for name in {method.name for method, press in presses.items() if reads_further(press)}:
        kept |= read_further(asker().model, ids, read.full, {m: p for m, p in presses.items() if m.name == name})
    return Reading(read.full, kept, read.refused, read.logits)


@functools.cache
def rows(query_aware: bool = False) -> dict[Method, Any]:
    """What the study measures of a sample."""
    runner = SampleRunner(asker(), reference.score, query_aware=query_aware)
    own = [*methods_of(["PiKVPress"], SHARES), Method(FULL), Method(INT4)]
    measured = [*METHODS, *own] if not query_aware else [*methods_of(["SnapKVPress", "TOVAPress"], SHARES), *own]
    return {Method(row["press"], row["share"]): row for row in runner.measure(sample(), measured)}


@contextmanager
def drawing_alike(seed: int) -> Iterator[None]:
    """Have presses that draw at random draw what they do in one reading for all."""

    def begin(module: Any, _: Any) -> None:
        torch.manual_seed(seed + module.layer_idx)

    handles = [each.self_attn.register_forward_pre_hook(begin) for each in asker().model.model.layers]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_keeps_what_the_press_alone_keeps(method: Method) -> None:
    """The same numbers, bit for bit: the same functions of the same tensors."""
    kept, model, cache = reading().kept[method], asker().model, DynamicCache()
    with torch.no_grad(), drawing_alike(SEED), method.press()(model):
        model.model(input_ids=asker().encode(sample()).context, past_key_values=cache)
    for layer, alone, hidden, decoder in zip(
        kept.cache.layers, cache.layers, kept.hidden, model.model.layers, strict=True
    ):
        assert torch.equal(layer.keys, alone.keys)
        assert torch.equal(layer.values, alone.values)
        marks = getattr(decoder.self_attn, MARKS, None)
        assert (hidden is None) == (marks is None)
        if marks is not None:
            assert hidden is not None
            assert int(hidden.sum()) == len(marks[0])
            assert hidden[tuple(marks)].all()
            setattr(decoder.self_attn, MARKS, None)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_answers_what_the_press_alone_answers(method: Method) -> None:
    """By the runner's protocol, on the cache that frees what the press evicts."""
    paged = reading().kept[method].hides or method in UNEVEN
    cache = PiKVCache.for_model(asker().model, **LAYOUT) if paged else DynamicCache()
    row = rows()[method]
    with drawing_alike(zlib.crc32(sample().id.encode()) >> 1):
        alone = asker().ask(asker().encode(sample()), cache, method.press())
    assert row["answer"] == alone.text
    assert row["score"] == reference.score(sample(), alone.text)["string_match"]
    if method not in UNEVEN:
        assert row["kv_bytes"] == alone.cost.kv_bytes_prefill


@pytest.mark.parametrize("share", SHARES)
def test_pikv_press_is_as_it_is_alone(share: float) -> None:
    row, cache = rows()[Method("PiKVPress", share)], PiKVCache.for_model(asker().model, **LAYOUT)
    alone = asker().ask(asker().encode(sample()), cache, Method("PiKVPress", share).press())
    assert (row["answer"], row["kv_bytes"]) == (alone.text, alone.cost.kv_bytes_prefill)


def test_caches_without_a_press() -> None:
    encoded = asker().encode(sample())
    full = asker().ask(encoded, DynamicCache())
    row = rows()[Method(FULL)]
    assert (row["answer"], row["kv_bytes"]) == (full.text, full.cost.kv_bytes_prefill)
    int4 = asker().ask(encoded, PiKVCache.for_model(asker().model, **LAYOUT, key_codec="int4", value_codec="int4"))
    row = rows()[Method(INT4)]
    assert (row["answer"], row["kv_bytes"]) == (int4.text, int4.cost.kv_bytes_prefill)


@pytest.mark.parametrize("method", [*methods_of(["SnapKVPress", "PiKVPress"], SHARES), Method(FULL)], ids=str)
def test_query_aware_is_generate_over_the_whole_prompt(method: Method) -> None:
    own = method.name == "PiKVPress"
    cache = PiKVCache.for_model(asker().model, **LAYOUT) if own else DynamicCache()
    alone = asker().ask_together([asker().encode(sample())], cache, method.press())[0]
    row = rows(query_aware=True)[method]
    assert (row["answer"], row["kv_bytes"]) == (alone.text, alone.cost.kv_bytes_prefill)


def test_a_press_that_fails_is_named_and_others_go_on() -> None:
    failing = Method("ObservedAttentionPress", 0.5)
    runner = SampleRunner(asker(), reference.score, query_aware=False)
    found = {row["press"]: row for row in runner.measure(sample(), [failing, Method("KnormPress", 0.5)])}
    assert "eager" in found["ObservedAttentionPress"]["error"]
    assert "score" in found["KnormPress"]


def test_a_press_that_changes_what_others_share_is_refused() -> None:
    with pytest.raises(RuntimeError, match="in place"):
        read_once(asker().model, torch.arange(3, 80)[None], {"think": kvpress.ThinKPress(0.5, window_size=16)})


def test_presses_that_cannot_be_measured_together_are_refused() -> None:
    with pytest.raises(InputError, match="FinchPress"):
        check([Method("FinchPress", 0.5)])


def test_every_press_of_kvpress_is_measured_or_left_out_for_a_reason() -> None:
    named = set(re.findall(r"\w+", " ".join([*PRESSES, *LEFT_OUT])))
    assert set(kvpress.__all__) - named == {"BasePress", "ScorerPress", "KVPressTextGenerationPipeline"}


def test_full_bytes_of_a_kept_prompt() -> None:
    full = reading().full
    kept = Kept(full, [None] * len(full.layers), 0)
    assert not kept.hides
    assert stored_bytes(kept.cache) == stored_bytes(full)


# What is kept of an interrupted run


def _main(tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    given = ["--model", "reference", "--dtype", "float32", "--length", "300", "--samples", "2", "--shares", "0.5"]
    given += ["--tasks", "niah_single_1", "niah_multikey_1", "--parts", str(tmp_path / "parts")]
    study.main([*given, "--output", str(tmp_path / "out.json"), *more])
    found: list[dict[str, Any]] = json.loads((tmp_path / "out.json").read_text())["scores"]
    return found


def test_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    presses = ["--presses", "KnormPress", "PiKVPress", FULL]
    once = _main(tmp_path, *presses)
    assert {(row["press"], row["samples"]) for row in once} == {("KnormPress", 4), ("PiKVPress", 4), (FULL, 4)}
    (file,) = (tmp_path / "parts").iterdir()
    rows = kept(file)
    # The last sample is cut off, as by a process that was ended while it wrote.
    file.write_bytes(file.read_bytes()[:-10])
    asked: list[tuple[str, list[Method]]] = []
    measured = SampleRunner.measure

    def noting(self: SampleRunner, one: Any, methods: Any) -> Any:
        asked.append((one.id, list(methods)))
        return measured(self, one, methods)

    monkeypatch.setattr(SampleRunner, "measure", noting)
    again = _main(tmp_path, *presses)
    assert asked == [(rows[-1]["id"], methods_of(["KnormPress", "PiKVPress", FULL], [0.5]))]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, once))
    asked.clear()
    # Another version measures this project's presses anew, and nothing else.
    _main(tmp_path, *presses, "--version", "2")
    assert len(asked) == 4
    assert {method.name for _, methods in asked for method in methods} == {"PiKVPress"}


def test_some_of_each_task_come_first() -> None:
    drawn = reference.generate(300, 2, tasks=("niah_single_1", "niah_multikey_1"), seed=0)
    tasks = [each.task for each in study.ordered(drawn, 2)]
    assert tasks == ["niah_single_1", "niah_multikey_1"] * 2


# What is made of it


def _row(press: str, task: str, index: int, score: float, share: float = 0.5, kv_share: float = 0.5) -> dict[str, Any]:
    return {"press": press, "share": share, "task": task, "id": f"{task}-{index}", "score": score, "kv_share": kv_share}


def test_means_are_over_tasks_and_differences_over_pairs() -> None:
    measured = [
        _row("KnormPress", "a", 0, 1.0, kv_share=0.4),
        _row("KnormPress", "a", 1, 0.0, kv_share=0.4),
        _row("KnormPress", "b", 0, 0.0, kv_share=0.7),
        _row("PiKVPress", "a", 0, 1.0),
        _row("PiKVPress", "b", 0, 0.5),
    ]
    knorm, own = rows_of(measured)
    assert (knorm["samples"], knorm["score"], knorm["kv_share"]) == (3, 25.0, pytest.approx(0.5))
    assert knorm["tasks"] == {"a": 50.0, "b": 0.0}
    # Of the sample that only one of them has nothing is known: 0 and -50 points.
    assert (knorm["pairs"], knorm["difference"][0]) == (2, -25.0)
    assert own["score"] == 75.0
    assert "difference" not in own
    failed = {"press": "X", "share": 0.5, "task": "a", "id": "a-0", "error": "no"}
    assert errors_of([failed, failed | {"id": "a-1"}]) == [{"press": "X", "share": 0.5, "samples": 2, "error": "no"}]


def test_intervals_need_samples() -> None:
    """A bootstrap of one sample per task has no width, which would be told of as certainty."""
    few = [_row("KnormPress", "a", index, index % 2) for index in range(4)]
    assert "low" not in rows_of(few)[0]
    five = rows_of([*few, _row("KnormPress", "a", 4, 0.0)])[0]
    assert five["low"] < five["score"] == 40.0 < five["high"]


def test_only_presses_that_keep_to_the_bytes_are_best() -> None:
    over = {"press": "Over", "share": 0.5, "samples": 4, "score": 90.0, "low": 85.0, "high": 95.0, "kv_share": 0.6}
    within = over | {"press": "Within", "score": 80.0, "low": 70.0, "high": 90.0, "kv_share": 0.51}
    full = over | {"press": FULL, "share": 1.0, "kv_share": 1.0}
    del full["low"]
    lines = table([over, within, full]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [FULL, "4", "90.0 at 100.0%", "–"]
    assert "| 90.0 ± 5.0 at 60.0% |" in re.sub(" +", " ", lines[3])
    assert "**80.0 ± 10.0 at 51.0%**" in lines[4]


def test_the_docs_show_the_tables_of_the_committed_results() -> None:
    shown = (ROOT / "docs" / "presses.md").read_text()
    for model in MODELS:
        assert equal_bytes_tables(RESULTS / FILE, model) in shown
    assert ceiling_table(RESULTS / "ceiling") in shown


def test_tasks_are_those_that_the_model_can_do() -> None:
    """At half or more with all of its cache, at the shortest length."""
    runs = [json.loads(file.read_text()) for file in (RESULTS / "ceiling").glob("*/summary.json")]
    (shortest,) = (run for run in runs if run["data_dir"] == "1024")
    assert tuple(task for task, found in shortest["tasks"].items() if found["mean"] >= 50) == study.TASKS
