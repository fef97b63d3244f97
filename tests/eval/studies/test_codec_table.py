"""The table of the codecs in docs/codecs.md: that of the committed results, and the measurements behind it hold."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from report_folders import write_run

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.common.kv import KV
from pikv_hf.config import CODECS
from pikv_hf.eval.bench.decode import Comparison, filled_pikv, geometry_model
from pikv_hf.eval.bench.decode import Timing as CpuTiming
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.gpu.attention_speed import AttentionSpeed
from pikv_hf.eval.gpu.copy_speed import as_row
from pikv_hf.eval.gpu.timing import Timing as GpuTiming
from pikv_hf.eval.report.result_rows import write_rows
from pikv_hf.eval.runner.options import read_options
from pikv_hf.eval.studies.codecs import codec_costs
from pikv_hf.eval.studies.codecs import codec_table as codec_report
from pikv_hf.eval.studies.codecs import sample_kv as data
from pikv_hf.eval.studies.codecs.attention_error import PAGE, WINDOW, Subject
from pikv_hf.eval.studies.codecs.codec_costs import CHOICES, Choice, Measured, Packed, Reader, measure_errors
from pikv_hf.eval.studies.codecs.codec_table import NOT_MEASURED, codec_table
from pikv_hf.eval.studies.codecs.sample_kv import (
    GEOMETRIES,
    OBSERVED,
    QUERIES,
    AttentionInput,
    random_inputs,
    reference_inputs,
)
from pikv_hf.pages.pool_id import PoolId

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "eval" / "results"


# What is committed


def test_the_docs_show_the_table_of_the_committed_results() -> None:
    assert codec_table(RESULTS) in (ROOT / "docs" / "codecs.md").read_text()


def test_committed_results_are_complete() -> None:
    costs = json.loads((RESULTS / "codec-costs.json").read_text())
    assert [(row["codec"], row.get("rank")) for row in costs["codecs"]] == [(c.codec, c.rank) for c in CHOICES]
    models = {codec_costs.REFERENCE, *GEOMETRIES, "random"}
    assert {(row["codec"], row["model"]) for row in costs["errors"]} == {(c, m) for c in CODECS for m in models}
    asked = {(run.cache, run.length) for run in read_options(ROOT / "eval" / "codecs.yaml")}
    runs = [json.loads(file.read_text()) for file in (RESULTS / "codecs").glob("*/summary.json")]
    assert {(run["cache"], int(run["data_dir"])) for run in runs} == asked
    assert all(run["samples"] == 420 for run in runs)
    timed = json.loads((RESULTS / "bench-codecs-cpu.json").read_text())["results"]
    assert {(case["codec"], case["tokens"]) for case in timed} >= {(c, n) for c in CODECS for n in codec_report.TOKENS}


# The table, of results made up


def costs_of(choice: Choice, number: int) -> dict[str, Any]:
    """Return a row whose figures are all different."""
    figures = {"bytes_4_heads": 0.5, "bytes_8_heads": 0.4, "bytes_reference": 0.6}
    row = {name: share + number / 1000 for name, share in figures.items()}
    errors = {"error_reference": number / 1000, "error_random": number / 500}
    ranks = {"rank": choice.rank, "reference_rank": choice.rank_at(32)}
    return {"codec": choice.codec, **ranks, **row, **errors, "split": {choice.codec: 1.0}}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_rows(tmp_path / "codec-costs.json", {}, {"codecs": [costs_of(c, i) for i, c in enumerate(CHOICES)]})
    return tmp_path


def cells(results: Path) -> dict[str, list[str]]:
    """Return the rows of the table by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in codec_table(results).splitlines()]
    return {first: rest for first, *rest in lines}


def cpu_case(codec: str, tokens: int, to_none: float | None, batch: int = 1) -> dict[str, Any]:
    timing = CpuTiming(1.0, 1.0, 1.0, 1.0, 5)
    return dataclasses.asdict(Comparison("decode", batch, tokens, timing, timing, 1.0, 1.0, 0.0, codec, to_none))


def gpu_row(kind: Any, tokens: int, p50: float | None, **changes: Any) -> dict[str, Any]:
    timing = None if p50 is None else GpuTiming(p50, p50, p50, 9)
    speed = AttentionSpeed("Qwen3-30B-A3B", 32, 4, 128, 128, tokens, 8, kind, 1, timing)
    return as_row(dataclasses.replace(speed, **changes))


def write_gpu(results: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (results / "gpu").mkdir(exist_ok=True)
    content = {"gpu": {"name": name}, "attention": rows}
    (results / "gpu" / f"gpu-check-{name}.json").write_text(json.dumps(content))


def test_bytes_and_errors_alone(results: Path) -> None:
    table = cells(results)
    names = ["none", "int8", "int4", "int2", "fp8", "auto", "lowrank, rank D/4", "lowrank, rank D/2"]
    assert list(table)[2:] == [*names, "lowrank+int4, rank D/4"]
    assert table["none"] == ["50.0% / 40.0%", "60.0%", "0% / 0%", *[NOT_MEASURED] * 3]
    assert table["int2"] == ["50.3% / 40.3%", "60.3%", "0.3% / 0.6%", *[NOT_MEASURED] * 3]
    assert len({len(row) for row in table.values()}) == 1
    assert table["codec"][5] == "GPU: kernel time / none at 32k, 128k"


def test_scores_go_to_the_rows_of_their_codecs(results: Path) -> None:
    def run(cache: str, mean: float, **changes: Any) -> None:
        score = {"mean": mean, "low": mean, "high": mean}
        write_run(results / "codecs" / f"{mean}", cache, cache=cache, score=score, **changes)

    run("dynamic", 91.0)
    run("dynamic", 92.0, press="SnapKVPress")
    run("quantized:quanto:4", 93.0)
    run("pikv:key_codec=int4,value_codec=int4", 94.04)
    run("pikv:key_codec=int4,value_codec=int2", 95.0)
    run("pikv:value_codec=lowrank,key_codec=lowrank", 96.0)
    run("pikv:key_codec=lowrank,value_codec=lowrank,rank=16", 97.0)
    run("pikv:key_codec=lowrank+int4,value_codec=lowrank+int4,rank=8", 98.0)
    scores = {name: row[3] for name, row in cells(results).items()}
    expected = {
        "none": "91.0 (20)",
        "int4": "94.0 (20)",
        "lowrank, rank D/4": "96.0 (20)",
        "lowrank, rank D/2": "97.0 (20)",
        "lowrank+int4, rank D/4": "98.0 (20)",
    }
    assert {name: score for name, score in scores.items() if score.endswith("(20)")} == expected
    run("pikv", 99.0)
    with pytest.raises(InputError, match=r"2 RULER runs of none: \['dynamic', 'pikv'\]"):
        codec_table(results)


def test_times_on_a_cpu(results: Path) -> None:
    cases = [cpu_case("none", 32768, 1.0), cpu_case("int4", 32768, 0.618), cpu_case("int4", 131072, 0.4)]
    cases += [cpu_case("int4", 32768, 9.0, batch=4), cpu_case("int8", 32768, None), cpu_case("lowrank", 131072, 0.3)]
    (results / "bench-codecs-cpu.json").write_text(json.dumps({"results": cases}))
    times = {name: row[4] for name, row in cells(results).items()}
    assert times["none"] == f"1.00, {NOT_MEASURED}"
    assert times["int4"] == "0.62, 0.40"
    assert times["int8"] == NOT_MEASURED
    assert times["lowrank, rank D/4"] == f"{NOT_MEASURED}, 0.30"
    assert times["lowrank, rank D/2"] == NOT_MEASURED


def test_times_on_gpus(results: Path) -> None:
    rows = [gpu_row("none", 32768, 2.0), gpu_row("int4", 32768, 0.9), gpu_row("int8", 32768, None, note="no time left")]
    rows += [gpu_row("int2", 32768, None, note="red", failed=True), gpu_row("int4", 131072, 5.0)]
    rows += [gpu_row("int4", 32768, 9.0, batch=32), gpu_row("int4", 32768, 9.0, geometry="gpt-oss")]
    write_gpu(results, "NVIDIA A", rows)
    write_gpu(results, "NVIDIA B", [gpu_row("none", 131072, 4.0), gpu_row("fp8", 131072, 3.0)])
    table = cells(results)
    lengths = "kernel time / none at 32k, 128k"
    assert table["codec"][5:] == [f"NVIDIA A: {lengths}", f"NVIDIA B: {lengths}"]
    assert table["none"][5:] == [f"1.00, {NOT_MEASURED}", f"{NOT_MEASURED}, 1.00"]
    # At 131,072 tokens there is nothing to compare the first GPU's time with.
    assert table["int4"][5:] == [f"0.45, {NOT_MEASURED}", NOT_MEASURED]
    assert table["int8"][5] == table["auto"][5] == NOT_MEASURED
    assert table["int2"][5] == f"failed, {NOT_MEASURED}"
    assert table["fp8"][5:] == [NOT_MEASURED, f"{NOT_MEASURED}, 0.75"]


def test_the_command_prints_the_table(
    results: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    codec_report.main([str(results)])
    assert capsys.readouterr().out == codec_table(results)
    with pytest.raises(SystemExit):
        codec_report.main([str(tmp_path_factory.mktemp("empty"))])
    assert "there is no" in capsys.readouterr().err


# The measurements, small


@pytest.fixture(scope="module")
def layers() -> list[AttentionInput]:
    """Return the four layers of the bundled model on one prompt."""
    return reference_inputs(1024, 1)[:4]


@pytest.fixture(scope="module")
def errors(layers: list[AttentionInput]) -> dict[tuple[str, str | None], Measured]:
    with torch.inference_mode():
        subjects, reader = [Subject.of(layer) for layer in layers], Reader()
        found = [measure_errors("reference", subjects, choice, reader) for choice in CHOICES]
    return {(each.codec, each.rank): each for each in found}


def test_every_codec_is_a_row() -> None:
    assert {choice.codec for choice in CHOICES} == set(CODECS)
    assert len(set(CHOICES)) == len(CHOICES) == len(CODECS) + 1
    default = filled_pikv(geometry_model(), *torch.randn(2, 1, 4, 1200, 128), key_codec="lowrank")
    basis = default.layers[0].table.pools.encoders.bases(KV.KEYS)[0]
    assert basis.shape[-1] == Choice("lowrank", 4).rank_at(128), "rank D/4 is the default"


@pytest.mark.parametrize(("codec", "most"), [("int8", 0.55), ("int4", 0.30), ("int2", 0.18)])
def test_bytes_at_head_dim_128(codec: str, most: float) -> None:
    with torch.inference_mode():
        shares = [codec_costs.random_bytes(Choice(codec), heads) for heads in codec_costs.HEADS]
    assert 0.9 * most < shares[1] < shares[0] <= most


def test_all_that_is_not_the_plain_pool_counts() -> None:
    cache = filled_pikv(geometry_model(), *torch.randn(2, 1, 4, 2000, 128).bfloat16(), key_codec="int4")
    cache.layers[0].settle()
    table, packed = cache.layers[0].table, Packed.of(cache)
    pool = table.pools.packed[PoolId.parse("int4/none")]
    tokens = int(pool.count.sum())
    assert packed.tokens == {"int4/none": tokens}
    assert packed.plain_size == tokens * 4 * 256 * 2
    assert packed.size == sum(t.nbytes for t in pool.tensors()) + pool.host_bytes + table.host_bytes
    assert (packed + packed).share == packed.share


def test_pages_that_no_codec_took_count_as_they_are() -> None:
    keys, values = torch.randn(2, 1, 4, 2000, 128)
    keys[:, :, 600] = torch.inf
    options = {"key_codec": "int4", "value_codec": "none", "placement": "hash"}
    given = {"wild": keys, "tame": keys.nan_to_num(posinf=1.0)}
    counted = {name: _settled(filled_pikv(geometry_model(), each, values, **options)) for name, each in given.items()}
    assert counted["wild"].tokens == {"int4/none": counted["tame"].tokens.total() - PAGE, "none": PAGE}
    assert counted["wild"].plain_size == counted["tame"].plain_size
    # Keys of 32 bits instead of 4 in one page of about fifty.
    assert counted["wild"].size > counted["tame"].size + 0.7 * PAGE * 4 * 128 * 4


def _settled(cache: PiKVCache) -> Packed:
    cache.layers[0].settle()
    return Packed.of(cache)


def test_bytes_of_the_bundled_model() -> None:
    with torch.inference_mode():
        found = {codec: codec_costs.reference_bytes(Choice(codec), 512) for codec in ("none", "int4", "auto")}
    assert {dim for _, dim in found.values()} == {32}
    shares = {codec: packed.share for codec, (packed, _) in found.items()}
    assert 2.0 < shares["none"] < 3.0, "float32, and pages that are not full"
    assert 0.3 < shares["int4"] < 0.5, "metadata weighs more at head dim 32 and few tokens"
    assert sum(found["auto"][0].split.values()) == pytest.approx(1, abs=1e-3)
    assert len(found["auto"][0].split) > 1


def test_attention_without_a_codec_is_exact(errors: dict[tuple[str, str | None], Measured]) -> None:
    """The 48 queries see what they see in the model, each up to its own token."""
    none = errors["none", None]
    assert none.error < 1e-5
    assert (none.key_error, none.value_error, none.logit_error, none.coded) == (None, None, None, 0)


def test_fewer_bits_cost_accuracy(errors: dict[tuple[str, str | None], Measured]) -> None:
    for name in ("error", "key_error", "value_error", "logit_error"):
        figures = [getattr(errors[codec, None], name) for codec in ("int8", "int4", "int2")]
        assert 0 < 4 * figures[0] < figures[1] < figures[2] / 2
        wide = [("lowrank", "D/4"), ("lowrank", "D/2"), ("lowrank+int4", "D/4")]
        low, high, rest = (getattr(errors[key], name) for key in wide)
        assert low > high > rest > 0
    assert all(0.5 < each.coded < 0.9 for key, each in errors.items() if key[0] != "none")
    auto = errors["auto", None].logit_error
    assert auto is not None
    assert auto < PiKVConfig().error_budget, "the budget of a page's worst head"


def test_observed_queries_come_before_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = random_inputs("gpt-oss-20b", 200)
    monkeypatch.setattr(data, "QUERIES", QUERIES + OBSERVED)
    for layer, longer in zip(usual, random_inputs("gpt-oss-20b", 200), strict=True):
        assert layer.query.shape == (64, QUERIES, 64)
        assert torch.equal(torch.cat([layer.observed, layer.query], 1), longer.query)


def test_the_first_page_and_the_newest_tokens_are_read_as_they_are(layers: list[AttentionInput]) -> None:
    """A wild token in the first page, in the window or after it is in no packed page; one between them is."""
    layer, reader = layers[0], Reader()
    tokens = layer.keys.shape[1]

    def error(where: int) -> float:
        values = layer.values.clone()
        values[:, where] *= 100
        with torch.inference_mode():
            return reader.read(Subject.of(dataclasses.replace(layer, values=values)), Choice("int8"))[1].value_error

    plain = error(PAGE - 1)
    assert error(tokens - QUERIES - WINDOW) == error(tokens - 1) == plain
    assert error(tokens // 2) != plain


def test_the_command_writes_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], layers: list[AttentionInput]
) -> None:
    monkeypatch.setattr(codec_costs, "reference_inputs", lambda *_: layers[:1])
    monkeypatch.setattr(codec_costs, "random_inputs", lambda *_: layers[1:2])
    monkeypatch.setattr(codec_costs, "random_bytes", lambda *_: 0.25)
    monkeypatch.setattr(codec_costs, "measure", partial(codec_costs.measure, tokens=512))
    monkeypatch.setattr(codec_costs, "CHOICES", (Choice("none"), Choice("auto"), Choice("lowrank", 2)))
    codec_costs.main(["--output", str(tmp_path), "--samples", "1"])
    written = json.loads((tmp_path / "codec-costs.json").read_text())
    assert written["versions"]["torch"] == torch.__version__
    assert written["definitions"] == codec_costs.ABOUT
    assert [row["codec"] for row in written["codecs"]] == ["none", "auto", "lowrank"]
    assert written["codecs"][2]["reference_rank"] == 16
    assert len(written["errors"]) == 3 * (1 + len(GEOMETRIES) + 1)
    assert list(cells(tmp_path))[2:] == ["none", "auto", "lowrank, rank D/2"]
    assert "attention error" in capsys.readouterr().out
