"""A table that reads in a narrow terminal too: where its columns do not fit, each row becomes a block of lines."""

from collections.abc import Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text


class FittingTable(Table):
    """A table of `rich` whose figures are never cut off or broken in the middle.

    With the room that its longest words need, and whole cells where a column may not wrap, it looks as any other table.
    With less it is printed row by row: the first cell, and below it each other cell behind its column's header.
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield what is printed in the width that there is."""
        if self._needed_width(console, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
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
        headers = [_plain(column.header) for column in self.columns]
        for first, *others in zip(*(column.cells for column in self.columns), strict=True):
            yield Text(_plain(first), style="bold")
            for header, cell in zip(headers[1:], map(_plain, others), strict=True):
                if cell:
                    yield Text(f"  {header}: {cell}" if header else f"  {cell}")
        yield Text()


def _beyond_words(column: Column) -> int:
    """Return by how much the longest cell of a column is wider than its longest word."""
    texts = [_plain(cell) for cell in (column.header, *column.cells)]
    lines, words = ([part for text in texts for part in split(text)] for split in (str.splitlines, str.split))
    return max(map(cell_len, lines), default=0) - max(map(cell_len, words), default=0)


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else Text.from_markup(str(cell)).plain
