"""The report in a real browser: it fits phones and desktops, sorts and filters, runs nothing else and loads nothing.

The page is put into frames of both sizes within a measuring page, since a browser window has a least width of its own.
The measuring page writes what it found as JSON into its own text, which `--dump-dom` prints.
"""

import functools
import html
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report_folders import HOSTILE, needle_rows, press, question_rows, write_run, write_suite

from pikv_hf.eval.report import load_runs, write_report

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
DARK = "--blink-settings=preferredColorScheme=0"
TITLE = "Report <b>under</b> test"
PHONE, DESKTOP = "390", "1280"
SIZES = {PHONE: 844, DESKTOP: 800}
MEASURE = """
addEventListener("load", () => {
  const measured = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, view = frame.contentWindow;
    const box = each => { const b = each.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
    const all = (selector, map, inside = page) => [...inside.querySelectorAll(selector)].map(map);
    const names = table => [...table.tBodies[0].rows].filter(row => !row.hidden).map(row => row.cells[0].innerText);
    const screen = {
      width: page.documentElement.scrollWidth,
      figure: box(page.querySelector("svg.accuracy") ?? page.body),
      rows: all("tbody tr", box, page.querySelector("table")),
      opened: all("details.all", each => each.open),
    };
    page.querySelectorAll("details").forEach(each => each.open = true);
    const found = measured[frame.id] = {
      screen,
      title: page.title,
      width: view.innerWidth,
      scrollWidth: page.documentElement.scrollWidth,
      blocks: all("main section", each => [...each.children].map(box)),
      cells: all("table", table => [...table.querySelectorAll("th, td")].map(box)),
      clipped: all("th, td, dd, summary, figcaption, h1, h2", each => each.scrollWidth > each.clientWidth + 1
        ? each.textContent : null).filter(Boolean),
      boxes: all(".scroll, details, svg.accuracy", box),
      letters: all("svg.accuracy text", each => each.getBoundingClientRect().height),
      figures: all("svg.accuracy", each => each.getAttribute("aria-label")),
      resources: view.performance.getEntriesByType("resource").map(each => each.name),
      scripts: page.scripts.length,
      handlers: all("*", each => each.getAttributeNames().filter(name => name.startsWith("on"))).flat(),
      colours: [view.getComputedStyle(page.body).color, view.getComputedStyle(page.body).backgroundColor],
      text: page.body.innerText,
      filter: !page.querySelector(".filter").hidden,
    };
    const scroll = page.querySelector("#runs .scroll"), first = scroll.querySelector("tbody th");
    scroll.scrollLeft = 200;
    found.sticky = [scroll.scrollLeft, first.getBoundingClientRect().left - scroll.getBoundingClientRect().left];
    scroll.scrollLeft = 0;
    const table = scroll.querySelector("table"), score = [...table.tHead.rows[0].cells].findIndex(
      each => each.textContent === "score");
    const click = column => table.tHead.rows[0].cells[column].querySelector("button")?.click();
    const values = () => [...table.tBodies[0].rows].map(row => row.cells[score].innerText);
    click(score); found.falling = [values(), table.tHead.rows[0].cells[score].getAttribute("aria-sort")];
    click(score); found.rising = [values(), table.tHead.rows[0].cells[score].getAttribute("aria-sort")];
    click(0); found.named = names(table);
    found.unsorted = all('[aria-sort]', each => each.textContent).length;
    const input = page.querySelector("#runs input");
    const say = text => { input.value = text; input.dispatchEvent(new view.Event("input")); };
    const details = () => all("details.run", each => each.hidden).filter(hidden => !hidden).length;
    const shown = () => [names(table), details(), page.querySelector("#runs output").textContent];
    for (const text of ["snap", "snap 25%", "5%", "nothing", ""]) { say(text); found["filter " + text] = shown(); }
    const row = page.querySelector("table tbody tr:last-child");
    row.cells[0].dispatchEvent(new view.PointerEvent("pointerover", {bubbles: true}));
    found.hot = all(".hot", each => each.dataset.m);
  }
  document.body.textContent = JSON.stringify(measured);
});
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: neither chromium on PATH nor $CHROMIUM")


def browse(page: Path, *options: str) -> str:
    """Open a page headless with a profile of its own, and return what Chromium prints."""
    assert CHROMIUM is not None
    profile = page.parent / f"profile-{len(list(page.parent.iterdir()))}"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def measure(report: Path, folder: Path, *options: str, policy: bool = False, sandbox: bool = False) -> dict[str, Any]:
    """Return what the measuring page finds in a copy of the report, by the frame's width.

    The copy has no content security policy unless `policy`, so that escaping alone has to keep hostile texts from
    running; in a `sandbox` no script runs at all.
    """
    source = report.read_text(encoding="utf-8")
    if not policy:
        source, policies = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
        assert policies == 1
    closed = ' sandbox="allow-same-origin"' if sandbox else ""
    frames = "".join(
        f'<iframe id="{width}"{closed} style="border:0;width:{width}px;height:{height}px" '
        f'srcdoc="{html.escape(source)}"></iframe>'
        for width, height in SIZES.items()
    )
    folder.mkdir()
    page = folder / "measure.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{frames}<script>{MEASURE}</script>', encoding="utf-8")
    dom = browse(page, "--window-size=1400,1000", "--dump-dom", *options)
    found = re.search(r"<body>(\{.*\})</body>", dom, re.DOTALL)
    assert found, dom[-500:]
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of many runs, long and hostile texts, two lengths, two models, and a needle run."""
    folder = tmp_path_factory.mktemp("report")
    write_suite(folder / "in" / "suite")
    rows = question_rows(answer=f"{HOSTILE}<img src=x onerror=\"document.title='ran'\">" + "x" * 500)
    label = f"Press{HOSTILE} with a long name (page_size=16, num_shards=4) on QuantizedCache 50%"
    write_run(folder / "in" / "hostile", label, rows, **press("HostilePress", 0.5))
    thirteen = question_rows([f"task_{n}" for n in range(13)])
    write_run(folder / "in" / "unbroken", "Label" * 30, thirteen, data_dir="4096")
    for model in ("one", "other/two"):
        write_run(folder / "in" / f"{model[:3]}-full", "DynamicCache", data_dir="8192", model=model)
        write_run(
            folder / "in" / f"{model[:3]}-half", "SnapKV 50%", data_dir="8192", model=model, **press("SnapKVPress", 0.5)
        )
    needles = needle_rows([index / 8 for index in range(9)], (512, 1024, 2048, 4096, 8192))
    write_run(folder / "in" / "needle", "DynamicCache", needles, dataset="needle", data_dir="")
    return write_report(load_runs([folder / "in"]), folder / "out", title=TITLE)


@pytest.fixture(scope="module")
def measured(report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(report, tmp_path_factory.mktemp("light") / "measure")


@pytest.fixture(params=[PHONE, DESKTOP])
def frame(measured: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = measured[request.param]
    assert found["width"] == int(request.param)
    return found


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes share more than a rounding error."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide > 1 and high > 1


def contrast(one: str, other: str) -> float:
    """Contrast of two `rgb()` colours by WCAG 2."""

    def light(colour: str) -> float:
        channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, bright = sorted((light(one), light(other)))
    return (bright + 0.05) / (dark + 0.05)


def png_size(path: Path) -> tuple[int, int]:
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


class TestLayout:
    def test_page_is_not_wider_than_the_window(self, frame: dict[str, Any]) -> None:
        assert frame["screen"]["width"] <= frame["width"]
        assert frame["scrollWidth"] <= frame["width"], "with everything unfolded"

    def test_boxes_stay_inside_but_figures_side_by_side_on_a_phone(self, frame: dict[str, Any]) -> None:
        beyond = [box for box in frame["boxes"] if box[0] < 0 or box[2] > frame["width"]]
        assert len(beyond) == (frame["width"] < 768), "the second model's figure is scrolled to"

    def test_first_screen_has_the_figure_and_the_table(self, frame: dict[str, Any]) -> None:
        height, screen = SIZES[str(frame["width"])], frame["screen"]
        assert screen["figure"][1] >= 0
        assert screen["figure"][3] <= height
        assert screen["figure"][2] - screen["figure"][0] >= 350
        seen = [row for row in screen["rows"] if row[3] <= height]
        assert len(seen) >= (2 if frame["width"] < 768 else 6)
        assert screen["opened"] == [False, False], "every single run is folded away"

    def test_letters_in_figures_can_be_read(self, frame: dict[str, Any]) -> None:
        assert len(frame["figures"]) == 3
        assert all("against KV bytes" in name for name in frame["figures"])
        assert min(frame["letters"]) >= 9

    def test_blocks_follow_each_other(self, frame: dict[str, Any]) -> None:
        for blocks in frame["blocks"]:
            assert len(blocks) >= 3
            assert not any(overlap(one, other) for i, one in enumerate(blocks) for other in blocks[:i])

    def test_cells_do_not_overlap_and_hold_their_text(self, frame: dict[str, Any]) -> None:
        for cells in frame["cells"]:
            assert not any(overlap(one, other) for i, one in enumerate(cells) for other in cells[:i])
        assert frame["clipped"] == []

    def test_names_stay_when_a_wide_table_is_scrolled(self, frame: dict[str, Any]) -> None:
        scrolled, left = frame["sticky"]
        assert scrolled > 0
        assert abs(left) <= 2


class TestContent:
    def test_tables_can_be_read(self, frame: dict[str, Any]) -> None:
        text = re.sub(r"\s+", " ", frame["text"])
        for expected in (
            "DynamicCache 80.0 77–82",
            "SnapKV – 60.0 57–62 40.0 37–42",
            "niah_single_1 string match vt string match mean",
            "SnapKV ruler 1024, reference 25% 40.0 37–42",
        ):
            assert expected in text

    def test_groups_and_hostile_texts_are_shown_as_text(self, frame: dict[str, Any]) -> None:
        for shown in (
            "ruler 1024, reference",
            "ruler 4096, reference",
            "ruler 8192, one and other/two",
            "needle, reference",
            HOSTILE,
            "<img src=x onerror=",
        ):
            assert shown in frame["text"]

    def test_nothing_runs_but_the_own_script(self, frame: dict[str, Any]) -> None:
        assert frame["title"] == TITLE
        assert frame["scripts"] == 1
        assert frame["handlers"] == []

    def test_nothing_is_loaded(self, report: Path, frame: dict[str, Any]) -> None:
        assert frame["resources"] == []
        source = html.unescape(re.sub(r"<dd.*?</dd>", "", report.read_text(encoding="utf-8"), flags=re.DOTALL))
        addresses = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']([^"'\s>]+)|url\(""", source)
        assert addresses
        assert all(address.startswith("#") for address in addresses)
        assert "@import" not in source


class TestScript:
    def test_a_click_on_a_head_sorts(self, frame: dict[str, Any]) -> None:
        for name, expected in (("falling", "descending"), ("rising", "ascending")):
            values, said = frame[name]
            numbers = [float(value) for value in values]
            assert len(numbers) == 13
            assert numbers == sorted(numbers, reverse=name == "falling")
            assert said == expected
        folded = [name.lower() for name in frame["named"]]
        assert folded.index("adakv(snapkv)") < folded.index("dynamiccache") < folded.index("pikvcache")
        assert frame["unsorted"] == 1, "by one column at a time"

    def test_the_filter_leaves_the_runs_with_all_words(self, frame: dict[str, Any]) -> None:
        assert frame["filter"]
        names, details, said = frame["filter snap"]
        assert (len(names), details, said) == (5, 5, "5 of 13")
        assert all("SnapKV" in name for name in names)
        assert frame["filter snap 25%"] == [["SnapKV"], 1, "1 of 13"]
        assert frame["filter 5%"][0] == [], "25% is another number"
        assert frame["filter nothing"][1:] == [0, "0 of 13"]
        assert frame["filter "][1:] == [13, ""]

    def test_a_method_pointed_at_is_shown_in_figure_and_tables(self, frame: dict[str, Any]) -> None:
        assert len(frame["hot"]) >= 4
        assert len(set(frame["hot"])) == 1

    def test_the_policy_allows_the_own_script(self, report: Path, tmp_path: Path) -> None:
        found = measure(report, tmp_path / "measure", policy=True)
        assert found[DESKTOP]["filter"]
        assert found[DESKTOP]["falling"][1] == "descending"

    def test_without_scripts_everything_is_there(self, report: Path, tmp_path: Path, measured: dict[str, Any]) -> None:
        found = measure(report, tmp_path / "measure", sandbox=True)[DESKTOP]
        assert not found["filter"], "what would do nothing is not shown"
        assert len(found["falling"][0]) == 13
        assert found["scrollWidth"] <= int(DESKTOP)
        missing = set(measured[DESKTOP]["text"].split()) - set(found["text"].split())
        assert missing <= {"Show", "runs", "with"}


class TestColours:
    @pytest.mark.parametrize("dark", [False, True])
    def test_text_stands_out_in_both_modes(self, report: Path, tmp_path: Path, dark: bool) -> None:
        options = [DARK] if dark else []
        ink, paper = measure(report, tmp_path / "measure", *options)[DESKTOP]["colours"]
        is_dark = functools.partial(contrast, "rgb(255, 255, 255)")
        assert contrast(ink, paper) >= 7
        assert (is_dark(paper) > 10) is dark

    def test_screenshot_is_not_blank(self, report: Path, tmp_path: Path) -> None:
        page, picture = tmp_path / "page.html", tmp_path / "picture.png"
        shutil.copy(report, page)
        blank = tmp_path / "blank.html"
        blank.write_text("<!doctype html>")
        for source, target in ((page, picture), (blank, tmp_path / "blank.png")):
            browse(source, "--window-size=1280,1600", f"--screenshot={target}")
        assert png_size(picture) == png_size(tmp_path / "blank.png") == (1280, 1600)
        assert picture.stat().st_size > 10 * (tmp_path / "blank.png").stat().st_size
