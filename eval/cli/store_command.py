"""``pikv store``: what a folder of contexts has, without a model."""

import time
from pathlib import Path
from typing import Annotated

import typer

from pikv_hf.common.budget import parse_bytes
from pikv_hf.eval.cli.border import FAILED
from pikv_hf.eval.errors import user_input

app = typer.Typer(help="Look at a folder of contexts, which ContextStore(path=) keeps.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="Of a store.", metavar="DIR")]


@app.command("ls")
def list_contexts(directory: Folder) -> None:
    """List contexts, the longest of each model first."""
    from pikv_hf.reports.fitting_table import as_text, light_table
    from pikv_hf.store.folder_report import stored_contexts

    with user_input(f"cannot read {directory}"):
        found = stored_contexts(directory)
    table = light_table("Contexts")
    for name in ("model", "file", "tokens", "own", "bytes", "written", ""):
        table.add_column(name, justify="right" if name in ("tokens", "own", "bytes") else "left")
    for each in found:
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.written))
        sizes = (f"{number:,}" for number in (each.tokens, each.own, each.nbytes))
        wrong = "" if each.wrong is None else "damaged"
        table.add_row(each.folder[:8], each.name[4:12], *sizes, written, wrong)
    typer.echo(as_text(table) if found else f"{directory} has no contexts")


@app.command()
def stats(directory: Folder) -> None:
    """Sum up contexts, tokens and bytes of each model."""
    from pikv_hf.store.folder_report import stored_contexts

    with user_input(f"cannot read {directory}"):
        found = stored_contexts(directory)
    for folder in dict.fromkeys(each.folder for each in found):
        own = [each for each in found if each.folder == folder]
        typer.echo(
            f"{folder[:8]}: {len(own):,} files, {sum(each.own for each in own):,} tokens, "
            f"{sum(each.nbytes for each in own):,} bytes, longest context {max(each.tokens for each in own):,} tokens"
        )
    typer.echo(f"{len(found):,} files, {sum(each.nbytes for each in found):,} bytes")


@app.command()
def verify(directory: Folder) -> None:
    """Read every file and compare checksums; the exit status is 1 if one is damaged."""
    from pikv_hf.store.folder_report import stored_contexts

    with user_input(f"cannot read {directory}"):
        found = stored_contexts(directory, verify=True)
    damaged = [each for each in found if each.wrong is not None]
    for each in damaged:
        typer.echo(f"{each.folder}/{each.name}: {each.wrong}")
    typer.echo(f"{len(found) - len(damaged):,} of {len(found):,} files are whole")
    if damaged:
        raise typer.Exit(FAILED)


@app.command()
def prune(
    directory: Folder,
    to: Annotated[str, typer.Option(help="The most bytes that files of each model may have, such as 10GiB.")],
) -> None:
    """Remove damaged files, and then contexts until the others fit."""
    from pikv_hf.store.folder_report import prune_contexts

    with user_input("invalid option"):
        limit = parse_bytes(to, "--to")
    with user_input(f"cannot prune {directory}"):
        files, nbytes = prune_contexts(directory, limit)
    typer.echo(f"{files:,} files removed, {nbytes:,} bytes")
