"""The table of the codecs in docs/codecs.md, from committed results.

It takes the bytes and errors of `codec-costs.json`, the RULER runs in `codecs`, the benchmark of decoding on a CPU,
`bench-codecs-cpu.json`, and what was measured on GPUs, `gpu/*.json`. A cell says what was not measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report.table import markdown

from .codec_costs import HEADS, codec_label, error_percent

NOT_MEASURED = "not measured"

#: Cached tokens of the decoding benchmarks, and rows of the one on a GPU, at the geometry of the CPU's.
TOKENS, GPU_ROWS, GPU_GEOMETRY = (32768, 131072), 8, "Qwen3-30B-A3B"

#: The rank that low-rank codecs have where a run or a benchmark names none.
DEFAULT_RANK = "D/4"

Row = dict[str, Any]
#: Cells by codec and number of tokens.
Times = dict[tuple[str, int], str]


def codec_table(results: Path) -> str:
    """Return the table in Markdown.

    Parameters
    ----------
    results : Path
        A folder with `codec-costs.json`. Without `codecs/*/summary.json`, `bench-codecs-cpu.json` or `gpu/*.json`,
        their columns say that they were not measured.

    Raises
    ------
    InputError
        If `codec-costs.json` is missing, or two RULER runs are of the same codec.
    """
    file = results / "codec-costs.json"
    if not file.is_file():
        raise InputError(f"there is no {file}; python -m pikv_hf.eval.studies.codecs.codec_costs makes it")
    rows: list[Row] = _json(file)["codecs"]
    runs = [_json(each) for each in sorted((results / "codecs").glob("*/summary.json"))]
    decoding = _cpu_times(results / "bench-codecs-cpu.json")
    gpus = [_gpu_times(_json(each)) for each in sorted((results / "gpu").glob("*.json"))] or [("GPU", {})]
    heads = " / ".join(map(str, HEADS))
    lengths = ", ".join(f"{tokens // 1024}k" for tokens in TOKENS)
    header = [
        "codec",
        f"bytes (D = 128), {heads} KV heads",
        "bytes (reference model)",
        "attention error, reference / random",
        "RULER mean (n)",
        f"CPU: decode time / none at {lengths}",
        *(f"{name}: kernel time / none at {lengths}" for name, _ in gpus),
    ]
    return markdown(header, [_cells(row, runs, [decoding, *(times for _, times in gpus)]) for row in rows])


def _cells(row: Row, runs: Sequence[Row], timings: Sequence[Times]) -> list[str]:
    errors = [error_percent(row[f"error_{model}"]) + "%" for model in ("reference", "random")]
    has_default = row.get("rank") in (None, DEFAULT_RANK)
    return [
        codec_label(row),
        " / ".join(f"{row[f'bytes_{heads}_heads']:.1%}" for heads in HEADS),
        f"{row['bytes_reference']:.1%}",
        " / ".join(errors),
        _ruler_score(row, runs),
        *(_at_lengths(times, row["codec"]) if has_default else NOT_MEASURED for times in timings),
    ]


def _at_lengths(times: Times, codec: str) -> str:
    found = [times.get((codec, tokens)) for tokens in TOKENS]
    return ", ".join(each or NOT_MEASURED for each in found) if any(found) else NOT_MEASURED


def _ruler_score(row: Row, runs: Sequence[Row]) -> str:
    """Return mean and samples of a codec's run; `DynamicCache` stands for none, whose answers are the same."""
    found = [run for run in runs if run["press"] is None and _is_of(run["cache"], row)]
    if len(found) > 1:
        raise InputError(f"there are {len(found)} RULER runs of {codec_label(row)}: {[run['cache'] for run in found]}")
    return f"{found[0]['score']['mean']:.1f} ({found[0]['samples']})" if found else NOT_MEASURED


def _is_of(cache: str, row: Row) -> bool:
    """Return whether a cache, as the evaluation names it, has the codec and rank of a row."""
    name, _, rest = cache.partition(":")
    if name not in ("dynamic", "pikv"):
        return False
    options = dict(option.split("=", 1) for option in rest.split(",")) if rest else {}
    codecs = {options.get(f"{part}_codec", "none") for part in ("key", "value")}
    if codecs != {row["codec"]}:
        return False
    if not row.get("rank"):
        return True
    return int(options["rank"]) == row["reference_rank"] if "rank" in options else row["rank"] == DEFAULT_RANK


def _cpu_times(file: Path) -> Times:
    """Return times over those of the codec none, by codec and tokens, of one row."""
    cases = _json(file)["results"] if file.is_file() else []
    return {
        (case["codec"], case["tokens"]): f"{case['to_none']:.2f}"
        for case in cases
        if case["batch"] == 1 and case["to_none"] is not None
    }


def _gpu_times(content: Row) -> tuple[str, Times]:
    """Return a GPU's name, and the kernel's times over those on bf16 pages, by kind and tokens."""
    speeds = {
        (each["kind"], each["tokens"]): each
        for each in content.get("attention", [])
        if (each["geometry"], each["batch"]) == (GPU_GEOMETRY, GPU_ROWS)
    }
    times: Times = {}
    for (kind, tokens), each in speeds.items():
        plain = speeds.get(("none", tokens), {}).get("p50_ms")
        if each["failed"]:
            times[kind, tokens] = "failed"
        elif each["p50_ms"] is not None and plain is not None:
            times[kind, tokens] = f"{each['p50_ms'] / plain:.2f}"
    return content["gpu"]["name"], times


def _json(file: Path) -> Row:
    content: Row = json.loads(file.read_text(encoding="utf-8"))
    return content


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.codecs.codec_table", description=__doc__)
    parser.add_argument("results", type=Path, help="folder of the results, eval/results")
    arguments = parser.parse_args(argv)
    try:
        table = codec_table(arguments.results)
    except InputError as error:
        parser.error(str(error))
    print(table, end="")


if __name__ == "__main__":
    main()
