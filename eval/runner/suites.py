"""Build the samples that options ask for."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.runner.models import REFERENCE, position_limit
from pikv_hf.eval.runner.options import EvalOptions
from pikv_hf.eval.tasks import longbench, needle, reference, ruler
from pikv_hf.eval.tasks.perplexity import Window, reference_windows, text_windows
from pikv_hf.eval.tasks.sample import EvalSample, EvalSet

#: Stands for the small sample of LongBench that comes with the package, in place of a folder.
BUNDLED = "bundled"


def build_set(options: EvalOptions, model: Any, tokenizer: Any) -> EvalSet:
    """Return the samples of a run, and how they are scored.

    Raises
    ------
    InputError
        If a task, file or length cannot be used.
    """
    builders = {"ruler": _ruler, "longbench": _longbench, "needle": _needle}
    with user_input(f"cannot prepare {options.suite}"):
        eval_set = builders[options.suite](options, model, tokenizer)
    if options.max_new_tokens is None:
        return eval_set
    return _shortened(eval_set, options.max_new_tokens)


def build_windows(options: EvalOptions, model: Any, tokenizer: Any) -> list[Window]:
    """Return the windows of a perplexity run."""
    _check_positions(options.length, model)
    with user_input("cannot prepare perplexity"):
        if options.text is None and _reference_wording(options):
            return reference_windows(tokenizer, options.length, options.samples, options.seed, model.device)
        text = ruler.Haystack.bundled().text if options.text is None else Path(options.text).read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return text_windows(ids.to(model.device, torch.long), options.length, options.samples, options.prefill)


def _ruler(options: EvalOptions, model: Any, tokenizer: Any) -> EvalSet:
    _check_positions(options.length, model)
    if options.hub:
        samples = ruler.load_hub(options.length, tasks=options.tasks or ruler.TASKS, samples=options.samples)
        return EvalSet(tuple(samples), ruler.score)
    if _reference_wording(options):
        tasks = options.tasks or reference.TASKS
        samples = reference.generate(options.length, options.samples, tasks=tasks, seed=options.seed)
        return EvalSet(tuple(samples), reference.score)
    samples = ruler.generate(
        tokenizer,
        options.length,
        options.samples,
        tasks=options.tasks or ruler.TASKS,
        seed=options.seed,
        haystack=_haystack(options),
        squad=_path(options.squad),
        hotpotqa=_path(options.hotpotqa),
    )
    return EvalSet(tuple(samples), ruler.score)


def _needle(options: EvalOptions, model: Any, tokenizer: Any) -> EvalSet:
    _check_positions(max(options.lengths), model)
    grid = needle.Grid(options.lengths, tuple(depth / 100 for depth in options.depths), options.samples, options.seed)
    if _reference_wording(options):
        return EvalSet(tuple(needle.reference_samples(grid)), reference.score, columns=("depth",))
    samples = needle.samples(grid, tokenizer, _haystack(options))
    return EvalSet(tuple(samples), ruler.score, columns=("depth",))


def _longbench(options: EvalOptions, model: Any, tokenizer: Any) -> EvalSet:
    bundled = options.data_dir == BUNDLED
    samples = longbench.load(
        options.tasks or tuple(longbench.SETS_E if options.e else longbench.SETS),
        data_dir=longbench.bundled_sample() if bundled else _path(options.data_dir),
        e=options.e,
        prompts=_path(options.prompts),
        limit=options.limit,
        max_context=options.max_context or _room_for_prompts(options, model),
        tokenizer=tokenizer,
    )
    return EvalSet(tuple(samples), longbench.score, longbench.bucket if options.e else None)


def _room_for_prompts(options: EvalOptions, model: Any) -> int | None:
    """Return the positions that the longest answer leaves, None if the model has no limit."""
    limit = position_limit(model)
    sets = [longbench.SETS[name] for name in options.tasks or longbench.SETS if name in longbench.SETS]
    answer = options.max_new_tokens or max((one.max_new_tokens for one in sets), default=0)
    if limit is not None and limit <= answer:
        raise InputError(f"answers of {answer} tokens leave no room in the model's {limit} positions")
    return None if limit is None else limit - answer


def _reference_wording(options: EvalOptions) -> bool:
    """Return whether samples are in the words of the bundled model: by default for it alone."""
    if options.wording == "auto":
        return options.model == REFERENCE and not (options.haystack or options.squad or options.hotpotqa)
    return options.wording == "reference"


def _check_positions(length: int, model: Any) -> None:
    limit = position_limit(model)
    if limit is not None and length > limit:
        raise InputError(f"samples of {length} tokens do not fit the model's {limit} positions")


def _haystack(options: EvalOptions) -> Any:
    return None if options.haystack is None else ruler.Haystack.read(Path(options.haystack))


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _shortened(eval_set: EvalSet, most: int) -> EvalSet:
    samples: tuple[EvalSample, ...] = tuple(
        dataclasses.replace(sample, max_new_tokens=most) for sample in eval_set.samples
    )
    return dataclasses.replace(eval_set, samples=samples)
