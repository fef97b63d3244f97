"""``pikv report``: result folders as a page, figures and tables, and one run against another."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.output_files import check_output_folder, write_file


class _FoldersFirst(TyperGroup):
    """Takes anything that is not the name of a command for the folders of a page: `pikv report results`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("--help", "--show-completion"):
            args = ["page", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_FoldersFirst,
    help="Show result folders of pikv eval: `pikv report FOLDER...` makes a page, figures and Markdown tables.",
    no_args_is_help=True,
)


@app.command()
def page(
    folders: Annotated[list[Path], typer.Argument(help="Result folders, or folders that hold some.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("report"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "PiKV evaluation",
) -> None:
    """One HTML page that needs nothing else, its figures as SVG, and its tables as Markdown.

    The command's name may be left out.
    """
    from pikv_hf.eval.report import load_runs, write_report

    check_output_folder(output, "--output")
    with user_input("cannot make a report"), _plain_warnings():
        written = write_report(load_runs(folders), output, title)
    figures = len(list(output.glob("*.svg")))
    typer.echo(f"{written} and {figures} figure{'s' * (figures != 1)} beside it")


@app.command()
def budgets(
    folders: Annotated[list[Path], typer.Argument(help="Result folders of one data set, length and model.")],
    output: Annotated[Path, typer.Option(help="Folder to write budgets.md and budgets.png to.")] = Path("report"),
) -> None:
    """Presses at equal bytes: a table of scores by method and budget, and a figure of it."""
    from pikv_hf.eval.report import budget_figure, budget_table, load_runs

    check_output_folder(output, "--output")
    with user_input("cannot make the table"), _plain_warnings():
        runs = load_runs(folders)
        table = budget_table(runs)
        write_file(output / "budgets.md", table)
        budget_figure(runs, output / "budgets.png")
    typer.echo(table, nl=False)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Result folder of the run to compare with.")],
    b: Annotated[Path, typer.Argument(help="Result folder of the other run.")],
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Compare the samples that both have.")] = False,
) -> None:
    """Differences of B to A over the same samples, with paired 95% intervals and p-values."""
    from pikv_hf.eval.report import compare as compare_runs
    from pikv_hf.eval.report import comparison_text

    with user_input("cannot compare"), _plain_warnings():
        typer.echo(comparison_text(compare_runs(_run(a), _run(b), allow_partial=allow_partial)))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings about folders as one line each, without the place in the code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        typer.echo(f"Warning: {warning.message}", err=True)


def _run(folder: Path) -> Any:
    from pikv_hf.eval.report import load_runs

    runs = load_runs([folder])
    if len(runs) != 1:
        raise InputError(f"{folder} holds {len(runs)} runs, expected one")
    return runs[0]
