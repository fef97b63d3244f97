"""Tables in wide and narrow terminals: every figure is whole in both."""

import io

import pytest
from rich import box
from rich.console import Console

from pikv_hf.reports.fitting_table import WIDTH, FittingTable, as_text, light_table

ROWS = [("2 processes", "56.9 GiB", "yes"), ("8 processes", "1,234,567", "[bold]no[/]")]


def printed(width: int, no_wrap: bool = True) -> str:
    table = FittingTable(title="Memory of the fullest device", box=box.SIMPLE_HEAD)
    for name in ("devices", "longest context", "fits"):
        table.add_column(name, no_wrap=no_wrap)
    for row in ROWS:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", range(14, 60))
def test_every_cell_is_whole_in_every_width(width: int) -> None:
    shown = " ".join(printed(width).split())
    for row in ROWS:
        for cell in row:
            assert cell.replace("[bold]", "").replace("[/]", "") in shown


def test_a_table_stays_a_table_while_its_cells_fit() -> None:
    # Three columns of 11, 15 and 4 characters, each with one of padding on both sides, between the edges of the box.
    assert "longest context:" not in printed(40)
    assert "  longest context: 56.9 GiB\n  fits: yes\n" in printed(30)
    # Columns that may wrap need the room of their words alone.
    assert "longest context:" not in printed(32, no_wrap=False)


@pytest.mark.parametrize("width", [30, 60])
def test_lines_end_with_their_text(width: int) -> None:
    assert all(line == line.rstrip() for line in printed(width).splitlines())


def test_headers_of_two_lines_are_one_where_rows_are_blocks() -> None:
    table = light_table("", "devices", "longest\ncontext")
    table.add_row("two", "8")
    shown = {}
    for width in (40, 12):
        console = Console(file=io.StringIO(), width=width)
        console.print(table)
        shown[width] = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert shown[40].startswith("longest devices context ─")
    assert shown[12] == "two longest context: 8"


def test_text_is_as_wide_as_a_terminal_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert max(map(len, as_text("word " * 100).splitlines())) <= WIDTH
