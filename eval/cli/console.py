"""Entry point of the command ``pikv``; needs a bare install alone, so that it can say what is missing."""

import importlib
import sys
from collections.abc import Sequence

from pikv_hf.common.extras import extra
from pikv_hf.eval.cli.border import border, print_anything


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``pikv`` and end the process with its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.
    """
    run("pikv", "pikv_hf.eval.cli.main", arguments)


def run(command: str, module: str, arguments: Sequence[str] | None = None) -> None:
    """Run a module's `app` as a command and end the process; a missing package is one line on standard error.

    Parameters
    ----------
    command : str
        What the user typed, for the help.
    module : str
        That has the app; it is imported only here, because typer may be missing.
    arguments : sequence of str, optional
        Of the command, by default those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    subcommand = [word for word in given[:1] if not word.startswith("-")]
    print_anything()
    with border():
        with extra("eval", needed_by=" ".join([command, *subcommand])):
            app = importlib.import_module(module).app
            from typer.main import get_command
        # Calling the app itself would replace tracebacks by typer's.
        get_command(app).main(given, prog_name=command)


if __name__ == "__main__":
    main()
