"""Entry point of the command ``pikv``; needs a bare install alone, so that it can say what is missing."""

import importlib
import sys

from pikv_hf.common.extras import MissingExtraError, extra


def main() -> None:
    """Run ``pikv``."""
    run("pikv", "pikv_hf.eval.cli.main")


def run(command: str, module: str) -> None:
    """Run a module's `app` as a command; a missing package is one line on standard error, and exit status 2.

    Parameters
    ----------
    command : str
        What the user typed, for the help.
    module : str
        That has the app; it is imported only here, because typer may be missing.
    """
    subcommand = [word for word in sys.argv[1:2] if not word.startswith("-")]
    try:
        with extra("eval", needed_by=" ".join([command, *subcommand])):
            importlib.import_module(module).app(prog_name=command)
    except MissingExtraError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
