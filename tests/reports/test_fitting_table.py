"""Tables in wide and narrow terminals: every figure is whole in both."""

import io

import pytest
from rich import box
from rich.console import Console

from pikv_hf.reports.fitting_table import FittingTable

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
