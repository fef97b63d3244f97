"""A table that reads in a narrow terminal too: where its columns do not fit, each row becomes a block of lines."""

import io
from collections.abc import Iterable, Iterator

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

#: Columns of text that no terminal has asked for: what `str()` returns, and what is written to a file or a pipe.
WIDTH = 80


def light_table(title: str, *columns: str, show_header: bool = True, no_wrap: bool = True) -> "FittingTable":
    """Return an empty table whose first column is text and whose other columns are figures.

    Parameters
    ----------
    title : str
        Above the table, bold.
    *columns : str
        Headers.
    show_header : bool
        Whether they are shown.
    no_wrap : bool
        Whether each cell is one line; else words may move to the next.
    """
    table = FittingTable(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        show_header=show_header,
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=no_wrap)
    return table


def as_text(shown: RenderableType) -> str:
    """Return what is printed of something where there is no terminal."""
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text().rstrip()


class FittingTable(Table):
    """A table of `rich` whose figures are never cut off or broken in the middle.

    With the room that its longest words need, and whole cells where a column may not wrap, it looks as any other table.
    With less it is printed row by row: the first cell, and below it each other cell behind its column's header.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what is printed in the width that there is."""
        if self._needed_width(console, options) <= options.max_width:
            yield from _without_trailing_blanks(super().__rich_console__(console, options))
        else:
            yield from self._blocks()

    def _needed_width(self, console: Console, options: ConsoleOptions) -> int:
        # rich's own minimum is that of whole words, also for columns whose cells it then cuts off.
        anywhere = options.update(width=1 << 16)
        words = Measurement.get(console, anywhere, self).minimum
        return words + sum(_beyond_words(column) for column in self.columns if column.no_wrap)

    def _blocks(self) -> Iterator[RenderableType]:
        if self.title:
            yield Text(_plain(self.title), style="bold")
        headers = [" ".join(_plain(column.header).split()) for column in self.columns]
        for first, *others in zip(*(column.cells for column in self.columns), strict=True):
            yield Text(_plain(first), style="bold")
            for header, cell in zip(headers[1:], map(_plain, others), strict=True):
                if cell:
                    yield Text(f"  {header}: {cell}" if header else f"  {cell}")
        yield Text()


def _without_trailing_blanks(rendered: RenderResult) -> Iterator[Segment]:
    """Yield the segments of a table without the blanks that fill its lines up, which copying would take along."""
    segments: Iterable[Segment] = (each for each in rendered if isinstance(each, Segment))
    for line in Segment.split_lines(segments):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            last = line.pop()
            line.append(Segment(last.text.rstrip(), last.style, last.control))
        yield from line
        yield Segment.line()


def _beyond_words(column: Column) -> int:
    """Return by how much the longest cell of a column is wider than its longest word."""
    texts = [_plain(cell) for cell in (column.header, *column.cells)]
    lines, words = ([part for text in texts for part in split(text)] for split in (str.splitlines, str.split))
    return max(map(cell_len, lines), default=0) - max(map(cell_len, words), default=0)


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
