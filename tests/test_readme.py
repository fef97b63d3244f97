"""What README.md and docs/ say can be followed: their Python runs, their commands, links and paths exist.

Every Python block runs, those of a page one after the other, on the bundled model and without a network. A block that
needs what a test machine may lack, such as several GPUs, is fenced with ``python notest``. Commands are not run: their
subcommands, options and make targets are looked up.
"""

import json
import re
import shlex
import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from pikv_hf.eval.cli.main import app

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "eval" / "results"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "CONTRIBUTING.md"]

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:src|kernels|presses|eval|tests|docs)/[\w./-]*")

#: What measurements leave on the machine that made them.
MADE_BY_COMMANDS = {"eval/results/gpu/"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(page: Path, language: str) -> list[tuple[int, str]]:
    """Return the line and text of each block of code in a language."""
    text = page.read_text(encoding="utf-8")
    found = [(m["info"], text.count("\n", 0, m.start()) + 2, m["body"]) for m in _FENCE.finditer(text)]
    return [(line, body) for info, line, body in found if info == language]


def prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


# Length


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 170


# Python


@pytest.mark.parametrize("page", [page for page in [README, *DOCS] if fences(page, "python")], ids=name)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shared: dict[str, object] = {"__name__": "example"}
    for line, body in fences(page, "python"):
        # Blank lines in front give an error the line number of the page.
        exec(compile("\n" * (line - 1) + body, name(page), "exec"), shared)


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_pages_open_with_an_example(page: Path) -> None:
    top = page.read_text(encoding="utf-8").split("\n## ")[0]
    assert re.search(r"^```(python|bash)$", top, re.MULTILINE)


def test_the_readme_prints_the_number_that_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    exec(fences(README, "python")[0][1], {})
    assert capsys.readouterr().out.startswith("9268.")


# Commands


def commands(page: Path) -> list[str]:
    """Return the shell commands of a page, those within sentences included, without comments."""
    blocks = "\n".join(body for _, body in fences(page, "bash"))
    lines = [*blocks.splitlines(), *_CODE.findall(prose(page))]
    return [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pikv_commands_exist(page: Path) -> None:
    for line in commands(page):
        if line.startswith("pikv "):
            check_command(shlex.split(line, comments=True)[1:])


def check_command(words: list[str]) -> None:
    """Raise if the words after `pikv` name no command, or an option that it does not have."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.split("=")[0] for word in rest if word.startswith("--") and word != "--"}
    assert given <= known | {"--help"}, f"pikv {' '.join(words)}: {sorted(given - known)}"
    # `pikv report FOLDER` is short for `pikv report page FOLDER`.
    if hasattr(command, "commands") and command.name != "report":
        assert set(rest) <= {"...", "--help"}, f"pikv {' '.join(words)}: no such command"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands(page):
        if line.startswith("make "):
            words = [word for word in shlex.split(line, comments=True)[1:] if "=" not in word]
            assert set(words) <= targets, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_extras_exist(page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"(?:pikv-hf|\.)\[([a-z,]+)\]", page.read_text(encoding="utf-8"))
    assert {extra for names in named for extra in names.split(",")} <= set(project["optional-dependencies"])


# Links and paths


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = _HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "AGENTS.md"], ids=name)
def test_links_resolve(page: Path) -> None:
    for target in _LINK.findall(prose(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", [*PAGES, ROOT / "AGENTS.md"], ids=name)
def test_paths_exist(page: Path) -> None:
    for code in _CODE.findall(prose(page)):
        if _PATH.fullmatch(code) and code not in MADE_BY_COMMANDS:
            assert (ROOT / code).exists(), code


def test_the_index_lists_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    assert {page.name for page in DOCS if page != index} <= set(_LINK.findall(index.read_text(encoding="utf-8")))


# Figures


def test_the_headline_figures_are_those_of_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    decode = json.loads((RESULTS / "bench-decode-cpu.json").read_text())["results"]
    step = next(case for case in decode if (case["batch"], case["tokens"]) == (1, 131072))
    times = [f"{1000 * step[cache]['p50']:.1f} ms" for cache in ("pikv", "dynamic")]
    assert f"{times[0]}, `DynamicCache` {times[1]}, **{step['ratio']:.1f}x faster**" in text
    codecs = json.loads((RESULTS / "codecs-smollm2.json").read_text())
    int4 = [row for row in codecs["perplexity"] if row["codec"] == "int4"]
    assert f"**{statistics.fmean(row['share'] for row in int4):.0%} of the bytes**" in text
    prose, code = (
        next(row for row in int4 if (row["text"], row["tokens"]) == (name, 2048)) for name in ("prose", "code")
    )
    assert f"SmolLM2-135M {prose['change']:+.1%} on prose, {code['change']:+.1%} on code" in text
    ours, theirs, full = presses(0.125)
    assert f"{ours['samples']} samples: RULER **{ours['score']:.1f}**, full cache {full['score']:.1f}" in text
    best = f"{theirs['press'].removesuffix('Press')}, {theirs['score']:.1f} at {100 * theirs['kv_share']:.1f}%"
    assert f"kvpress's best there, {best}." in text
    ours, theirs, _ = presses(0.0625)
    best = f"{theirs['press'].removesuffix('Press')} {theirs['score']:.1f} at {100 * theirs['kv_share']:.1f}%"
    assert f"At 6.25%: {ours['score']:.1f}, {best} " in text


def test_the_options_have_the_figures_of_the_results() -> None:
    text = README.read_text(encoding="utf-8")
    codecs = {row["codec"]: row for row in json.loads((RESULTS / "codecs-smollm2.json").read_text())["ruler"]}
    assert f"RULER {codecs['int4']['score']:.1f} ({codecs['none']['score']:.1f})" in text
    ours, _, full = presses(0.125)
    assert f"12.5% of the bytes, RULER {ours['score']:.1f} ({full['score']:.1f})" in text
    routed = json.loads((RESULTS / "routing-smollm2.json").read_text())["ruler"]
    row = next(each for each in routed if (each["policy"], each["share"], each["tokens"]) == ("page_mass", 0.25, 2048))
    assert f"25% of the pages read, RULER {row['score']:.1f} ({row['exact']:.1f})" in text
    budgets = {row["way"]: row for row in json.loads((RESULTS / "budgets-smollm2.json").read_text())["ruler"]}
    row, exact = budgets["budget 25%"], budgets["full"]
    assert f"RULER {row['score']:.1f} ({exact['score']:.1f}), {row['samples']} samples" in text


def presses(share: float) -> tuple[Any, Any, Any]:
    """Return PiKVPress, the best of kvpress and the full cache on SmolLM2 at 1,024 tokens."""
    scores = json.loads((RESULTS / "presses-at-equal-bytes.json").read_text())["scores"]
    setting = {"model": "smollm2", "tokens": 1024, "question": "unseen"}
    rows = [row for row in scores if setting.items() <= row.items()]
    here = {row["press"]: row for row in rows if row["share"] == share}
    ours = here.pop("PiKVPress")
    return (
        ours,
        max(here.values(), key=lambda row: row["score"]),
        next(row for row in rows if row["press"] == "DynamicCache"),
    )
