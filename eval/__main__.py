"""``python -m pikv_hf.eval``, for ``accelerate launch -m pikv_hf.eval ruler ...``: the same as ``pikv eval``."""

from pikv_hf.eval.cli.console import run

if __name__ == "__main__":
    run("pikv eval", "pikv_hf.eval.cli.eval_command")
