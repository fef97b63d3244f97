"""Evaluation of caches and presses: the command line, tasks, runs and reports, benchmarks, the demo, the bundled model.

Models, caches and presses by name come in; scores, bytes and times go out, as result folders, tables and figures.
Imports go down: studies and training; cli; bench, demo and report; runner; tasks; metrics and reference; hub, output
files; errors and provenance. gpu stands apart. All may import the presses and the cache, which know nothing of it.
"""

from typing import TYPE_CHECKING, Any

from pikv_hf.common.extras import extra

if TYPE_CHECKING:
    from pikv_hf.eval.runner.api import evaluate_cache as evaluate_cache

__all__ = ["evaluate_cache"]


def __getattr__(name: str) -> Any:
    # The command line imports this package for its help; what an evaluation needs takes seconds to import.
    if name in __all__:
        with extra("eval", needed_by=f"{__name__}.{name}"):
            from pikv_hf.eval.runner import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
