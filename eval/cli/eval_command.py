"""``pikv eval``: accuracy, bytes and speed of a cache."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner.options import EvalOptions, read_options

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    help="Measure accuracy, live bytes and speed of a cache, with or without a press.", no_args_is_help=True
)
_DEFAULT = EvalOptions(suite="ruler")

Model = Annotated[str, typer.Option(help="reference (bundled), a folder or a Hub name.")]
Cache = Annotated[str, typer.Option(help="dynamic, quantized:quanto:4, pikv or pikv:OPTION=VALUE,...")]
Press = Annotated[str | None, typer.Option(help="PiKVPress, SnapKVPress, AdaKVPress(SnapKVPress), ...")]
Ratio = Annotated[float | None, typer.Option(help="Share of the cache that the press removes.")]
QueryAware = Annotated[bool, typer.Option("--query-aware", help="Read the question with the context, by generate.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only this one; may be repeated.")]
Samples = Annotated[int, typer.Option(help="Per task, per cell of the needle grid, or windows.")]
Limit = Annotated[int | None, typer.Option(help="Most samples of the run (of each set of LongBench).")]
Seed = Annotated[int, typer.Option(help="Of all randomness.")]
BatchSize = Annotated[int, typer.Option(help="Samples at once, padded on the left; 1 with a press.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Instead of the suite's own limit of an answer.")]
MaxContext = Annotated[int | None, typer.Option(help="Longest context in tokens; by default the model's positions.")]
Wording = Annotated[str, typer.Option(help="ruler, reference (the bundled model's words) or auto.")]
Haystack = Annotated[Path | None, typer.Option(help="Text file or folder to use as haystack.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as saved.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda:0, or auto to spread layers over GPUs.")]
Attention = Annotated[str | None, typer.Option(help="Attention implementation of transformers.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Output = Annotated[Path, typer.Option(help="Folder in which the run's own folder is made.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Measure anew what is complete.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]

RESULTS = Path("results")


@app.command()
def ruler(
    model: Model = _DEFAULT.model,
    cache: Cache = _DEFAULT.cache,
    press: Press = None,
    ratio: Ratio = None,
    query_aware: QueryAware = False,
    tasks: Tasks = None,
    length: Annotated[int, typer.Option(help="Tokens of a sample, answer included.")] = _DEFAULT.length,
    samples: Samples = _DEFAULT.samples,
    limit: Limit = None,
    seed: Seed = _DEFAULT.seed,
    batch_size: BatchSize = _DEFAULT.batch_size,
    max_new_tokens: MaxNewTokens = None,
    max_context: MaxContext = None,
    wording: Wording = _DEFAULT.wording,
    haystack: Haystack = None,
    squad: Annotated[Path | None, typer.Option(help="SQuAD JSON for qa_1.")] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="HotpotQA JSON for qa_2.")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Ready-made samples from the Hub.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    threads: Threads = None,
    output: Output = RESULTS,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """RULER: retrieval, variable tracking, aggregation and questions, generated here for any tokenizer and length."""
    _run("ruler", locals())


@app.command()
def longbench(
    model: Model = _DEFAULT.model,
    cache: Cache = _DEFAULT.cache,
    press: Press = None,
    ratio: Ratio = None,
    query_aware: QueryAware = False,
    tasks: Tasks = None,
    limit: Limit = None,
    seed: Seed = _DEFAULT.seed,
    batch_size: BatchSize = _DEFAULT.batch_size,
    max_new_tokens: MaxNewTokens = None,
    max_context: MaxContext = None,
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of the official .jsonl files, or 'bundled'; by default the Hub.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="The official dataset2prompt.json.")] = None,
    e: Annotated[bool, typer.Option("--e", help="LongBench-E.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    threads: Threads = None,
    output: Output = RESULTS,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """LongBench or LongBench-E: 21 sets of questions, summaries, code, each with its own metric."""
    _run("longbench", locals())


@app.command()
def perplexity(
    model: Model = _DEFAULT.model,
    cache: Cache = _DEFAULT.cache,
    press: Press = None,
    ratio: Ratio = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file; by default a bundled text.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window.")] = _DEFAULT.length,
    prefill: Annotated[int, typer.Option(help="Tokens read and compressed before the rest.")] = _DEFAULT.prefill,
    chunk: Annotated[int, typer.Option(help="Tokens scored at once.")] = _DEFAULT.chunk,
    samples: Samples = _DEFAULT.samples,
    seed: Seed = _DEFAULT.seed,
    wording: Wording = _DEFAULT.wording,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    threads: Threads = None,
    output: Output = RESULTS,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity of a long text, chunk by chunk through the cache."""
    _run("perplexity", locals())


@app.command()
def needle(
    model: Model = _DEFAULT.model,
    cache: Cache = _DEFAULT.cache,
    press: Press = None,
    ratio: Ratio = None,
    query_aware: QueryAware = False,
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Tokens; may be repeated.")] = None,
    depths: Annotated[list[float] | None, typer.Option("--depth", help="Percent; may be repeated.")] = None,
    samples: Samples = 5,
    limit: Limit = None,
    seed: Seed = _DEFAULT.seed,
    batch_size: BatchSize = _DEFAULT.batch_size,
    wording: Wording = _DEFAULT.wording,
    haystack: Haystack = None,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    threads: Threads = None,
    output: Output = RESULTS,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """One needle at every depth of texts of every length."""
    _run("needle", locals())


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
    try:
        runs = read_options(file)
    except InputError as error:
        raise _failure(error) from None
    _evaluate(runs, output, overwrite, quiet)


def _run(suite: str, given: dict[str, Any]) -> None:
    """Run one evaluation from a command's arguments; those left out keep the defaults of `EvalOptions`."""
    output, overwrite, quiet = (given.pop(name) for name in ("output", "overwrite", "quiet"))
    try:
        options = EvalOptions.from_dict({"suite": suite} | {k: v for k, v in given.items() if v is not None})
    except InputError as error:
        raise _failure(error) from None
    _evaluate([options], output, overwrite, quiet)


def _evaluate(runs: "Sequence[EvalOptions]", output: Path, overwrite: bool, quiet: bool) -> None:
    from pikv_hf.eval.runner.api import FailedRun, run_all
    from pikv_hf.eval.runner.run_view import show, show_failures

    failures = []
    try:
        for result in run_all(runs, output, overwrite=overwrite, progress=not quiet):
            if isinstance(result, FailedRun):
                failures.append(result)
                show_failures([result])
            else:
                show(result)
    except InputError as error:
        raise _failure(error) from None
    if failures:
        show_failures(failures, of=len(runs))
        raise typer.Exit(1)


def _failure(error: InputError) -> typer.Exit:
    typer.echo(f"Error: {error}", err=True)
    return typer.Exit(2)
