"""Evaluation of caches, benchmarks, the demo, the bundled reference model and its training."""

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
