"""Run one evaluation: measure what is missing, over one process or several, and finish the folder."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.output_files import check_output_folder
from pikv_hf.eval.provenance import provenance
from pikv_hf.eval.runner.folder import ResultFolder, Row
from pikv_hf.eval.runner.jobs import Item, Job, perplexity_job, question_job
from pikv_hf.eval.runner.method import Method, Subject
from pikv_hf.eval.runner.options import EvalOptions
from pikv_hf.eval.runner.processes import processes
from pikv_hf.eval.runner.quiet import quiet_transformers, warn_once
from pikv_hf.eval.runner.refusals import refusals
from pikv_hf.eval.runner.run_summary import by_task, cost_summary, score_summary
from pikv_hf.eval.runner.suites import build_set, build_windows
from pikv_hf.eval.tasks.sample import EvalSet


@dataclasses.dataclass(frozen=True, slots=True)
class EvalResult:
    """What came out of a run.

    Attributes
    ----------
    rows : pandas.DataFrame or None
        One row per sample; None for a run that was only read, and whose samples were not kept.
    metrics : dict
        In kvpress's layout: `{task: {metric: percent}}`.
    summary : dict
        Means, 95% intervals, costs and provenance.
    folder : Path or None
        Where all that was written, if it was.
    skipped : bool
        Whether the folder was complete already, and only read.
    """

    rows: pd.DataFrame | None
    metrics: dict[str, Any]
    summary: dict[str, Any]
    folder: Path | None
    skipped: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What a run measures, and what its figures are called."""

    job: Job
    eval_set: EvalSet | None

    @property
    def measure(self) -> dict[str, Any]:
        if self.eval_set is None:
            return {"name": "perplexity", "unit": "", "higher_is_better": False}
        return {"name": "score", "unit": "%", "higher_is_better": True}

    def shown(self, score: float) -> float:
        """Return a mean of rows' scores on the scale of the tables: percent, or perplexity for nats."""
        return math.exp(score) if self.eval_set is None else 100 * score


def run(
    options: EvalOptions,
    method: Method,
    load: Callable[[], tuple[Any, Any]],
    output: Path | None,
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> EvalResult:
    """Measure a method, or read what an earlier, complete run with the same options measured.

    Parameters
    ----------
    options : EvalOptions
        What to run.
    method : Method
        What to run it with.
    load : callable
        Returns the model and its tokenizer; not called where there is nothing to measure.
    output : Path, optional
        Where the run's own folder is made.
    overwrite, progress : bool
        Whether to measure anew what is complete, and to show a progress bar.

    Raises
    ------
    InputError
        If the options do not fit the model, or the cache, the press or the model refuses.
    OSError
        If results cannot be written; those before are kept.
    """
    warn_once()
    folder = _folder(options, method, output)
    if folder is not None and folder.finished and not overwrite:
        rows, metrics, summary = folder.read()
        return EvalResult(rows, metrics, summary, folder.path, skipped=True)
    if folder is not None:
        check_output_folder(folder.path, "--output")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with contextlib.nullcontext() if progress else quiet_transformers():
        subject = Subject(*load(), method)
    refused = refusals(f"cannot measure {method.label} on {type(subject.model).__name__}", method.chosen_packages)
    with _noting_kept_rows(folder), refused, method.cache.prepare(subject.model):
        plan = _plan(options, subject)
        measured = _measure(plan.job, options, folder, overwrite, progress, method)
        metrics, summary = _metrics(plan, measured), _summary(plan, measured, options, subject)
        if folder is not None:
            if processes().is_main_process:
                folder.finish(measured, metrics, summary)
            processes().wait_for_everyone()
    return EvalResult(pd.DataFrame(measured), metrics, summary, folder.path if folder else None)


@contextlib.contextmanager
def _noting_kept_rows(folder: ResultFolder | None) -> Iterator[None]:
    """Note on whatever ends a run early, Ctrl-C included, what it leaves for the next one."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            if folder is not None and (kept := len(folder.partial_rows())):
                error.add_note(f"{kept} samples are kept in {folder.path}, the same command goes on from there")
        raise


def _folder(options: EvalOptions, method: Method, output: Path | None) -> ResultFolder | None:
    if output is None:
        return None
    return ResultFolder(output / options.folder_name(method.ratio), _config(options, method))


def _plan(options: EvalOptions, subject: Subject) -> _Plan:
    if options.suite == "perplexity":
        cut = build_windows(options, subject.model, subject.tokenizer)
        return _Plan(perplexity_job(subject, cut, options), None)
    eval_set = build_set(options, subject.model, subject.tokenizer)
    # LongBench's loader has applied the limit to each of its sets.
    if options.limit is not None and options.suite != "longbench":
        eval_set = dataclasses.replace(eval_set, samples=eval_set.samples[: options.limit])
    return _Plan(question_job(subject, eval_set, options), eval_set)


def _measure(
    job: Job, options: EvalOptions, folder: ResultFolder | None, overwrite: bool, progress: bool, method: Method
) -> list[Row]:
    """Return the rows of all items in their order; those that an interrupted run left are not measured again.

    Processes divide the items, but where they keep one cache together each of them measures all, and one writes.
    """
    state = processes()
    if folder is not None and overwrite and state.is_main_process:
        folder.clear()
    state.wait_for_everyone()
    known = folder.partial_rows() if folder is not None else {}
    # Nobody may write before everybody has read.
    state.wait_for_everyone()
    missing = [item for item in job.items if item.id not in known]
    mine = missing if method.cache.shared else missing[state.process_index :: state.num_processes]
    kept = folder if state.is_main_process or not method.cache.shared else None
    shown = progress and state.is_main_process
    new, failure = _tried(lambda: _measure_mine(job, mine, options, kept, shown, method.label))
    # A process that fails says so where the others wait for its rows.
    failures = [each for each in gather_object([failure and describe(failure)]) if each]
    if failures:
        raise failure or InputError(f"another process failed: {failures[0]}")
    # Of rows that all processes have, those of the first are taken.
    rows = known | {row["id"]: row for row in reversed(gather_object(new))}
    return [rows[item.id] for item in job.items]


def _tried(measure: Callable[[], list[Row]]) -> tuple[list[Row], Exception | None]:
    try:
        return measure(), None
    except Exception as error:
        return [], error


def describe(error: Exception) -> str:
    """Return what went wrong on one line."""
    said = " ".join(str(error).split())
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}".removesuffix(": ")


def _measure_mine(
    job: Job, items: Sequence[Item], options: EvalOptions, folder: ResultFolder | None, progress: bool, label: str
) -> list[Row]:
    """Measure this process's items batch by batch, and keep each batch as soon as it is done."""
    rows: list[Row] = []
    if items:
        job.warm_up()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(label, total=len(items))
        for start in range(0, len(items), options.batch_size):
            batch = job.measure(items[start : start + options.batch_size])
            if folder is not None:
                folder.append(batch, processes().process_index)
            rows += batch
            bar.advance(task, len(batch))
    return rows


def _metrics(plan: _Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """Return kvpress's metrics: per task the mean of its own score, or one mean per bucket where the suite has them."""
    if plan.eval_set is None:
        return {"perplexity": {"perplexity": round(plan.shown(float(np.mean([row["score"] for row in rows]))), 4)}}
    if plan.eval_set.bucket is None:
        return {task: {group[0]["metric"]: _percent(group)} for task, group in by_task(rows).items()}
    buckets = {sample.id: plan.eval_set.bucket(sample) for sample in plan.eval_set.samples}
    return {task: _by_bucket(group, buckets) for task, group in by_task(rows).items()}


def _by_bucket(rows: Sequence[Row], buckets: dict[str, str]) -> dict[str, float]:
    ordered = sorted(rows, key=lambda row: buckets[row["id"]])
    groups = itertools.groupby(ordered, key=lambda row: buckets[row["id"]])
    return {bucket: _percent(list(group)) for bucket, group in groups}


def _percent(rows: Sequence[Row]) -> float:
    return round(100 * float(np.mean([row["score"] for row in rows])), 2)


def _config(options: EvalOptions, method: Method) -> dict[str, Any]:
    """Return kvpress's configuration keys, followed by everything else that decides the result."""
    kvpress_keys = {
        "dataset": options.dataset,
        "data_dir": options.variant,
        "model": options.model,
        "press_name": options.press or "no_press",
        "compression_ratio": method.ratio,
        "press_init_command": str(method.new_press()),
    }
    others = options.result_options()
    # kvpress's data_dir is the variant; ours is where LongBench's files are.
    return kvpress_keys | {"files": others.pop("data_dir")} | others


def _summary(plan: _Plan, rows: Sequence[Row], options: EvalOptions, subject: Subject) -> dict[str, Any]:
    return {
        "dataset": options.dataset,
        "data_dir": options.variant,
        "model": options.model,
        "cache": options.cache,
        "press": options.press,
        "compression_ratio": subject.method.ratio,
        "query_aware": options.query_aware,
        "label": f"{subject.method.label} (query-aware)" if options.query_aware else subject.method.label,
        "samples": len(rows),
        "measure": plan.measure,
        **score_summary(rows, plan.shown),
        "cost": cost_summary(rows),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "processes": processes().num_processes,
        "batch_size": options.batch_size,
        "provenance": provenance(),
    }
