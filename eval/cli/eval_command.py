"""``pikv eval``: accuracy, bytes and speed of a cache."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pikv_hf.eval.cli.command_group import CommandGroup
from pikv_hf.eval.runner.options import EvalOptions, read_options

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    cls=CommandGroup,
    help="Measure accuracy, live bytes and speed of a cache, with or without a press.",
    no_args_is_help=True,
    add_completion=False,
)
_DEFAULT = EvalOptions(suite="ruler")

Output = Annotated[Path, typer.Option(help="Folder in which the run's own folder is made.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Measure anew what is complete.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]

RESULTS = Path("results")

#: Options of several suites, in the order of the help: what a value is, and its default.
_METHOD: dict[str, tuple[Any, Any]] = {
    "model": (
        Annotated[str, typer.Option(help="reference (bundled), smollm2, smollm2-moe, a folder or a Hub name.")],
        _DEFAULT.model,
    ),
    "cache": (
        Annotated[str, typer.Option(help="dynamic, quantized:quanto:4, pikv or pikv:OPTION=VALUE,...")],
        _DEFAULT.cache,
    ),
    "press": (Annotated[str | None, typer.Option(help="PiKVPress, SnapKVPress, AdaKVPress(SnapKVPress), ...")], None),
    "ratio": (Annotated[float | None, typer.Option(help="Share of the cache that the press removes.")], None),
    "query_aware": (
        Annotated[bool, typer.Option("--query-aware", help="Read the question with the context, by generate.")],
        False,
    ),
    "tasks": (Annotated[list[str] | None, typer.Option("--task", help="Only this one; may be repeated.")], None),
}
_SAMPLES: dict[str, tuple[Any, Any]] = {
    "samples": (
        Annotated[int, typer.Option(help="Per task, per cell of the needle grid, or windows.")],
        _DEFAULT.samples,
    ),
    "limit": (Annotated[int | None, typer.Option(help="Most samples of the run (of each set of LongBench).")], None),
    "seed": (Annotated[int, typer.Option(help="Of all randomness.")], _DEFAULT.seed),
    "batch_size": (
        Annotated[int, typer.Option(help="Samples at once, padded on the left; 1 with a press.")],
        _DEFAULT.batch_size,
    ),
    "max_new_tokens": (
        Annotated[int | None, typer.Option(help="Instead of the suite's own limit of an answer.")],
        None,
    ),
    "max_context": (
        Annotated[int | None, typer.Option(help="Longest context in tokens; by default the model's positions.")],
        None,
    ),
    "wording": (
        Annotated[str, typer.Option(help="ruler, reference (the bundled model's words) or auto.")],
        _DEFAULT.wording,
    ),
    "haystack": (Annotated[Path | None, typer.Option(help="Text file or folder to use as haystack.")], None),
}
_RUN: dict[str, tuple[Any, Any]] = {
    "dtype": (Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as saved.")], None),
    "device": (Annotated[str | None, typer.Option(help="cpu, cuda:0, or auto to spread layers over GPUs.")], None),
    "attn_implementation": (
        Annotated[str | None, typer.Option(help="Attention implementation of transformers.")],
        None,
    ),
    "threads": (
        Annotated[int | None, typer.Option(help="CPU threads; by default 1 for the bundled model, else torch's.")],
        None,
    ),
    "output": (Output, RESULTS),
    "overwrite": (Overwrite, False),
    "quiet": (Quiet, False),
}


def _suite(*without: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function the command of a suite: its own options between the shared ones, all but those named.

    The command line is made from the signature, so the function's `**shared` is replaced by what it stands for.
    """

    def register(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command)
        options = [each for each in own.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        left_out = {*without, *(option.name for option in options)}
        first, last = (_parameters(shared, left_out) for shared in (_METHOD, _SAMPLES | _RUN))
        command.__signature__ = own.replace(parameters=[*first, *options, *last])  # type: ignore[attr-defined]
        return app.command()(command)

    return register


def _parameters(shared: dict[str, tuple[Any, Any]], without: set[str]) -> list[inspect.Parameter]:
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in shared.items()
        if name not in without
    ]


@_suite()
def ruler(
    *,
    length: Annotated[int, typer.Option(help="Tokens of a sample, answer included.")] = _DEFAULT.length,
    squad: Annotated[Path | None, typer.Option(help="SQuAD JSON for qa_1.")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="HotpotQA JSON for qa_2.")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Ready-made samples from the Hub.")] = False,
    **shared: Any,
) -> None:
    """RULER: retrieval, variable tracking, aggregation and questions, generated here for any tokenizer and length."""
    _run("ruler", length=length, squad=squad, hotpotqa=hotpotqa, hub=hub, **shared)


@_suite("samples", "wording", "haystack")
def longbench(
    *,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of the official .jsonl files, or 'bundled'; by default the Hub.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="The official dataset2prompt.json.")] = None,
    e: Annotated[bool, typer.Option("--e", help="LongBench-E.")] = False,
    **shared: Any,
) -> None:
    """LongBench or LongBench-E: 21 sets of questions, summaries, code, each with its own metric."""
    _run("longbench", data_dir=data_dir, prompts=prompts, e=e, **shared)


@_suite("query_aware", "tasks", "limit", "batch_size", "max_new_tokens", "max_context", "haystack")
def perplexity(
    *,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file; by default a bundled text.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = _DEFAULT.length,
    prefill: Annotated[int, typer.Option(help="Tokens read and compressed before the rest.")] = _DEFAULT.prefill,
    chunk: Annotated[int, typer.Option(help="Tokens scored at once.")] = _DEFAULT.chunk,
    **shared: Any,
) -> None:
    """Perplexity of a long text, chunk by chunk through the cache."""
    _run("perplexity", text=text, length=length, prefill=prefill, chunk=chunk, **shared)


@_suite("tasks", "max_new_tokens", "max_context")
def needle(
    *,
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Tokens; may be repeated.")] = None,
    depths: Annotated[list[float] | None, typer.Option("--depth", help="Percent; may be repeated.")] = None,
    samples: Annotated[int, typer.Option(help="Per cell of the grid.")] = 5,
    **shared: Any,
) -> None:
    """One needle at every depth of texts of every length."""
    _run("needle", lengths=lengths, depths=depths, samples=samples, **shared)


@app.command("run")
def run_file(
    file: Annotated[Path, typer.Argument(help="YAML: options, or `runs`, a list of them; lists are tried one by one.")],
    output: Output = RESULTS,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """All runs that a YAML file describes.

    A run that fails is named, and the others go on; the exit status is then 1.
    """
    _evaluate(read_options(file), output, overwrite, quiet)


def _run(suite: str, *, output: Path, overwrite: bool, quiet: bool, **given: Any) -> None:
    """Run one evaluation from a command's options; those left out keep the defaults of `EvalOptions`."""
    options = EvalOptions.from_dict({"suite": suite} | {k: v for k, v in given.items() if v is not None})
    if options.model == _DEFAULT.model and options.threads is None and "OMP_NUM_THREADS" not in os.environ:
        # Its matrices are so small that threads mostly wait for one another, for long where a core is busy otherwise.
        options = dataclasses.replace(options, threads=1)
    _evaluate([options], output, overwrite, quiet)


def _evaluate(runs: "Sequence[EvalOptions]", output: Path, overwrite: bool, quiet: bool) -> None:
    from pikv_hf.eval.report.summary_file import read_summary
    from pikv_hf.eval.runner.api import FailedRun, run_all
    from pikv_hf.eval.runner.folder import SUMMARY
    from pikv_hf.eval.runner.run_view import show, show_failures

    failures = []
    for result in run_all(runs, output, overwrite=overwrite, progress=not quiet):
        if isinstance(result, FailedRun):
            failures.append(result)
            show_failures([result])
            continue
        if result.skipped and result.folder is not None:
            # Another version may have written it, with other fields.
            read_summary(result.folder / SUMMARY)
        show(result)
    if failures:
        show_failures(failures, of=len(runs))
        raise typer.Exit(1)
