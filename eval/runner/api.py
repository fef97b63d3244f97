"""Run evaluations from Python, one or many in a row."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.caches import CacheFactory, cache_factory
from pikv_hf.eval.runner.method import Method
from pikv_hf.eval.runner.models import load_model
from pikv_hf.eval.runner.options import EvalOptions
from pikv_hf.eval.runner.presses import PressFactory, press_factory
from pikv_hf.eval.runner.processes import processes
from pikv_hf.eval.runner.run import EvalResult, describe, run


def evaluate_cache(
    model: Any = "reference",
    tokenizer: Any = None,
    *,
    suite: str = "ruler",
    cache: str | Callable[[Any], Any] = "pikv",
    press: str | Callable[[], Any] | None = None,
    ratio: float | None = None,
    output: Path | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> EvalResult:
    """Measure accuracy, bytes and speed of a cache.

    Parameters
    ----------
    model : str or PreTrainedModel
        `reference` for the bundled model, a folder, a name on the Hub, or a model with its `tokenizer`.
    tokenizer : PreTrainedTokenizer, optional
        Needed with a model object.
    suite : str
        `ruler`, `longbench`, `perplexity` or `needle`.
    cache : str or callable
        `dynamic`, `quantized:quanto:4`, `pikv`, `pikv:page_size=64`, or a function from the model to an empty cache.
    press : str or callable, optional
        A press of this project or of kvpress, `AdaKVPress(SnapKVPress)`, or a function that returns a new one.
    ratio : float, optional
        Share of the cache that a press given by name removes.
    output : path, optional
        Where the run's own folder is made. Without it nothing is written, and nothing can be resumed.
    overwrite : bool
        Measure anew what is complete already.
    progress : bool
        Whether to show a progress bar on standard error.
    **options
        The other fields of :class:`~pikv_hf.eval.runner.options.EvalOptions`.

    Raises
    ------
    InputError
        For an option that cannot be used; the message names what was given and what is possible.

    Examples
    --------
    >>> result = evaluate_cache("reference", cache="pikv", tasks=["niah_single_1"], samples=2, progress=False)
    >>> result.summary["score"]["mean"]
    100.0
    """
    named = {"model": _model_name(model), "cache": _name(cache), "press": press and _name(press)}
    asked = EvalOptions.from_dict({"suite": suite, "ratio": ratio, **named, **options})
    caches = cache_factory(cache) if isinstance(cache, str) else CacheFactory(asked.cache, asked.cache, cache)
    method = Method(caches, _press(press, ratio))
    folder = None if output is None else Path(output)
    return run(asked, method, _loader(asked, model, tokenizer), folder, overwrite=overwrite, progress=progress)


@dataclasses.dataclass(frozen=True, slots=True)
class FailedRun:
    """A run that did not come to its end: what it measured, and why it stopped."""

    label: str
    error: Exception

    @property
    def reason(self) -> str:
        """The error on one line."""
        return describe(self.error)


def run_all(
    runs: Sequence[EvalOptions], output: Path, *, overwrite: bool = False, progress: bool = True
) -> Iterator[EvalResult | FailedRun]:
    """Run several evaluations one after the other; a model that stays the same is loaded once.

    What can be checked without a model is checked for all runs before the first one starts. After that a run that
    fails, as some presses do at some ratios, does not keep the others from running; a single one raises.
    """
    methods = [Method(cache_factory(options.cache), _press(options.press, options.ratio)) for options in runs]
    load = _keep_last(load_model)
    for options, method in zip(runs, methods, strict=True):
        loader = _loader(options, options.model, load=load)
        try:
            result: EvalResult | FailedRun = run(
                options, method, loader, output, overwrite=overwrite, progress=progress
            )
        except OSError:
            # The next run could not write its results either.
            raise
        except Exception as error:
            if len(runs) == 1:
                raise
            result = FailedRun(method.label, error)
        yield result


def _keep_last(load: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """Return `load`, which then gives its last result again; that is let go before another one needs the memory."""
    kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def load_once(*arguments: Any) -> tuple[Any, Any]:
        if arguments not in kept:
            kept.clear()
            kept[arguments] = load(*arguments)
        return kept[arguments]

    return load_once


def _loader(
    options: EvalOptions, model: Any, tokenizer: Any = None, load: Callable[..., tuple[Any, Any]] = load_model
) -> Callable[[], tuple[Any, Any]]:
    """Return what gives the model and tokenizer, once they are needed."""
    if not isinstance(model, str):
        return functools.partial(_given, model, tokenizer)
    device = options.device or str(processes().device)
    return functools.partial(load, options.model, options.dtype, device, _attention(options))


def _attention(options: EvalOptions) -> str | None:
    """Return the attention implementation; a press that looks at attention weights gets one that returns them."""
    if options.attn_implementation is None and "ObservedAttention" in (options.press or ""):
        return "eager"
    return options.attn_implementation


def _given(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    if tokenizer is None:
        raise InputError(f"a {type(model).__name__} needs its tokenizer, got None")
    return model.eval(), tokenizer


def _press(press: str | Callable[[], Any] | None, ratio: float | None) -> PressFactory | None:
    if press is None:
        return None
    if isinstance(press, str):
        return press_factory(press, ratio)
    return PressFactory(_name(press), float(getattr(press(), "compression_ratio", 0.0)), press)


def _model_name(model: Any) -> str:
    return model if isinstance(model, str) else model.config._name_or_path or type(model).__name__


def _name(value: str | Callable[..., Any]) -> str:
    return value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
