"""The table of codecs on a pretrained model in docs/codecs.md, from `codecs-smollm2.json`."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.report.table import markdown

NAME = "codecs-smollm2.json"
NOT_MEASURED = "not measured"
#: What a codec is called where its name in the study is short for something.
LABELS = {
    "int8/int4": "keys int8, values int4",
    "int4/int2": "keys int4, values int2",
    "int2/int4": "keys int2, values int4",
    "lowrank": "lowrank, rank D/4",
    "lowrank:32": "lowrank, rank D/2",
    "lowrank+int4": "lowrank+int4, rank D/4",
    "quanto:4": "QuantizedCache, quanto, 4 bits",
    "quanto:2": "QuantizedCache, quanto, 2 bits",
}

Row = dict[str, Any]


def pretrained_table(results: Path) -> str:
    """Return the table in Markdown: the perplexity without a codec, and how each codec changes it.

    Parameters
    ----------
    results : Path
        A folder with `codecs-smollm2.json`.

    Raises
    ------
    InputError
        If the file is missing.
    """
    file = results / NAME
    if not file.is_file():
        raise InputError(f"there is no {file}; python -m pikv_hf.eval.studies.codecs.pretrained_study makes it")
    content: Row = json.loads(file.read_text())
    texts = list(dict.fromkeys((row["text"], row["tokens"]) for row in content["perplexity"]))
    lengths = list(dict.fromkeys(row["tokens"] for row in content["ruler"]))
    codecs = dict.fromkeys(["none", *(row["codec"] for row in (*content["perplexity"], *content["ruler"]))])
    header = [
        "codec",
        "bytes",
        *(f"{text}, {tokens:,} tokens" for text, tokens in texts),
        *(f"RULER, {tokens:,} tokens" for tokens in lengths),
    ]
    return markdown(header, [_cells(codec, content, texts, lengths) for codec in codecs])


def _cells(codec: str, content: Row, texts: Sequence[tuple[str, int]], lengths: Sequence[int]) -> list[str]:
    plain = codec == "none"
    read = {(row["text"], row["tokens"]): row for row in content["perplexity"] if plain or row["codec"] == codec}
    asked = {row["tokens"]: row for row in content["ruler"] if row["codec"] == codec}
    shares = [row["share"] for row in read.values() if "share" in row and not plain]
    return [
        LABELS.get(codec, codec.replace("@", ", error budget ")),
        f"{sum(shares) / len(shares):.1%}" if shares else "-",
        *(f"{math.exp(read[text]['nats']):.2f}" if plain else _change(read.get(text)) for text in texts),
        *(_score(asked.get(tokens)) for tokens in lengths),
    ]


def _change(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    low, high = row["change_ci"]
    digits = 3 if high - low < 0.002 else 2
    return f"{100 * row['change']:+.{digits}f} ± {50 * (high - low):.{digits}f}%"


def _score(row: Row | None) -> str:
    return NOT_MEASURED if row is None else f"{row['score']:.1f} ({row['samples']})"


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m pikv_hf.eval.studies.codecs.pretrained_table", description=__doc__)
    parser.add_argument("results", type=Path, help="folder of the results, eval/results")
    arguments = parser.parse_args(argv)
    try:
        print(pretrained_table(arguments.results), end="")
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
