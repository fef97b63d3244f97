"""The report in a real browser: it fits phones and desktops, shows its figures, runs nothing and loads nothing.

The page is put into frames of both widths within a measuring page, since a browser window has a least width of its own.
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
PHONE, DESKTOP = 400, 1280
MEASURE = """
addEventListener("load", () => {
  const measured = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, view = frame.contentWindow;
    page.querySelectorAll("details").forEach(each => each.open = true);
    const box = each => { const b = each.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
    const all = (selector, map) => [...page.querySelectorAll(selector)].map(map);
    const style = view.getComputedStyle(page.body);
    measured[frame.id] = {
      title: page.title,
      width: view.innerWidth,
      scrollWidth: page.documentElement.scrollWidth,
      images: all("img", each => [each.naturalWidth, each.clientWidth, each.alt]),
      blocks: all("main section", each => [...each.children].map(box)),
      cells: all("table", table => [...table.querySelectorAll("th, td")].map(box)),
      clipped: all("th, td, dd, summary, figcaption, h1, h2", each => each.scrollWidth > each.clientWidth + 1
        ? each.textContent : null).filter(Boolean),
      boxes: all(".scroll, details", box),
      resources: view.performance.getEntriesByType("resource").map(each => each.name),
      scripts: page.scripts.length,
      handlers: all("*", each => each.getAttributeNames().filter(name => name.startsWith("on"))).flat(),
      colours: [style.color, style.backgroundColor],
      text: page.body.innerText,
    };
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


def measure(report: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Return what the measuring page finds in a copy of the report, by the frame's width.

    The copy has no content security policy, so that escaping alone has to keep hostile texts from running.
    """
    source, policies = re.subn(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8")
    )
    assert policies == 1
    frames = "".join(
        f'<iframe id="{width}" style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(source)}"></iframe>'
        for width in (PHONE, DESKTOP)
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
    """A report of many runs, long and hostile texts, two groups, and a needle run."""
    folder = tmp_path_factory.mktemp("report")
    write_suite(folder / "in" / "suite")
    rows = question_rows(answer=f"{HOSTILE}<img src=x onerror=\"document.title='ran'\">" + "x" * 500)
    label = f"Press{HOSTILE} with a long name (page_size=16, num_shards=4) on QuantizedCache 50%"
    write_run(folder / "in" / "hostile", label, rows, **press("HostilePress", 0.5))
    write_run(
        folder / "in" / "unbroken", "Label" * 30, question_rows([f"task_{n}" for n in range(13)]), data_dir="4096"
    )
    needles = needle_rows([index / 8 for index in range(9)], (512, 1024, 2048, 4096, 8192))
    write_run(folder / "in" / "needle", "DynamicCache", needles, dataset="needle", data_dir="")
    return write_report(load_runs([folder / "in"]), folder / "out", title=TITLE)


@pytest.fixture(scope="module")
def measured(report: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measure(report, tmp_path_factory.mktemp("light") / "measure")


@pytest.fixture(params=[PHONE, DESKTOP])
def frame(measured: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = measured[str(request.param)]
    assert found["width"] == request.param
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
        assert frame["scrollWidth"] <= frame["width"]
        assert all(left >= 0 and right <= frame["width"] for left, _, right, _ in frame["boxes"])

    def test_images_are_decoded_and_described(self, frame: dict[str, Any]) -> None:
        assert len(frame["images"]) == 3 + 3 + 3
        for natural, shown, alt in frame["images"]:
            assert natural >= 1800
            assert shown >= 600
            assert alt

    def test_blocks_follow_each_other(self, frame: dict[str, Any]) -> None:
        for blocks in frame["blocks"]:
            assert len(blocks) >= 3
            assert not any(overlap(one, other) for i, one in enumerate(blocks) for other in blocks[:i])

    def test_cells_do_not_overlap_and_hold_their_text(self, frame: dict[str, Any]) -> None:
        for cells in frame["cells"]:
            assert not any(overlap(one, other) for i, one in enumerate(cells) for other in cells[:i])
        assert frame["clipped"] == []


class TestContent:
    def test_tables_can_be_read(self, frame: dict[str, Any]) -> None:
        lines = frame["text"].splitlines()
        for expected in (
            "DynamicCache\t80.0 (77.0–82.0)\t100.0%\t101.0%\t1.00x",
            "SnapKV 75%\t40.0 (37.0–42.0)\t25.0%\t26.0%\t1.50x",
        ):
            assert any(line.startswith(expected) for line in lines)
        assert any(line.startswith("vt\tstring_match\t80.0 (77.0–82.0)") for line in lines)

    def test_groups_and_hostile_texts_are_shown_as_text(self, frame: dict[str, Any]) -> None:
        for shown in (
            "ruler 1024, reference",
            "ruler 4096, reference",
            "needle, reference",
            HOSTILE,
            "<img src=x onerror=",
        ):
            assert shown in frame["text"]

    def test_nothing_runs(self, frame: dict[str, Any]) -> None:
        assert frame["title"] == TITLE
        assert frame["scripts"] == 0
        assert frame["handlers"] == []

    def test_nothing_is_loaded(self, report: Path, frame: dict[str, Any]) -> None:
        assert [name for name in frame["resources"] if not name.startswith("data:image/png;base64,")] == []
        source = html.unescape(re.sub(r"<dd.*?</dd>", "", report.read_text(encoding="utf-8"), flags=re.DOTALL))
        addresses = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']?([^"'\s>]+)|url\(""", source)
        assert addresses
        assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
        assert "@import" not in source


class TestColours:
    @pytest.mark.parametrize("dark", [False, True])
    def test_text_stands_out_in_both_modes(self, report: Path, tmp_path: Path, dark: bool) -> None:
        options = [DARK] if dark else []
        ink, paper = measure(report, tmp_path / "measure", *options)[str(DESKTOP)]["colours"]
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
