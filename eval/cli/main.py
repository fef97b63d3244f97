"""The command ``pikv`` and its subcommands, which import what they need when they run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pikv_hf.config import CODECS, PiKVConfig
from pikv_hf.eval.cli.eval_command import app as evaluation
from pikv_hf.eval.cli.plan_command import plan
from pikv_hf.eval.cli.report_command import app as report
from pikv_hf.eval.demo.options import DemoOptions, tier_limits
from pikv_hf.eval.errors import InputError, user_input

if TYPE_CHECKING:
    from pikv_hf.eval.demo.demo import DemoResult

app = typer.Typer(
    name="pikv",
    help="PiKV: an exact, expert-sharded, paged KV cache for Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
)
bench = typer.Typer(help="Measure the cache against transformers' DynamicCache in the same run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")
app.add_typer(report, name="report")
app.command()(plan)
_DEFAULT = DemoOptions()


@app.command()
def version() -> None:
    """Print the version."""
    from pikv_hf.version import __version__

    typer.echo(__version__)


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or Hub name; by default the bundled model.")] = None,
    text: Annotated[Path | None, typer.Option(help="File to ask about; by default a synthetic haystack.")] = None,
    questions: Annotated[list[str] | None, typer.Option("--question", help="About --text; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of the haystack.")] = _DEFAULT.tokens,
    seed: Annotated[int, typer.Option(help="Of the haystack.")] = _DEFAULT.seed,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of each answer.")] = _DEFAULT.max_new_tokens,
    page_size: Annotated[int, typer.Option(help="Tokens per page.")] = _DEFAULT.pikv.page_size,
    recent_window: Annotated[int, typer.Option(help="Newest tokens, not in a shard.")] = _DEFAULT.pikv.recent_window,
    sink_tokens: Annotated[int, typer.Option(help="First tokens, not in a shard.")] = _DEFAULT.pikv.sink_tokens,
    num_shards: Annotated[int, typer.Option(help="Groups of experts.")] = _DEFAULT.pikv.num_shards,
    placement: Annotated[str, typer.Option(help="expert or balanced (by router), or hash (by position).")] = "expert",
    tiers: Annotated[
        str | None, typer.Option(help="Where pages go that do not fit: cpu=4MiB,disk keeps 4 MiB in memory.")
    ] = None,
    routing: Annotated[str, typer.Option(help="Which pages a step reads: all, or a policy.")] = _DEFAULT.pikv.routing,
    max_pages: Annotated[int, typer.Option(help="The most full pages that it reads.")] = int(_DEFAULT.pikv.max_pages),
    cache_devices: Annotated[
        str | None, typer.Option(help="Where the shards are: auto, or cuda:0,cuda:1,cpu; by default with the model.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as saved.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; by default a GPU if any.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = _DEFAULT.threads,
    record_trace: Annotated[
        Path | None, typer.Option(help="File for the primary expert of every token and layer, as pikv plan reads it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Ask several questions about one text with transformers' DynamicCache and with PiKVCache, and compare.

    Without options it needs no network: a small bundled model looks up numbers in 2,048 tokens of synthetic text.
    The exit status is 1 if the two caches' answers differ in any token, 2 if an option cannot be used.
    """
    given = {
        "model": model,
        "text": text,
        "questions": tuple(questions or ()),
        "tokens": tokens,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "cache_devices": tuple(part.strip() for part in cache_devices.split(",")) if cache_devices else (),
        "record_trace": record_trace,
    }
    storage = {
        "page_size": page_size,
        "recent_window": recent_window,
        "sink_tokens": sink_tokens,
        "num_shards": num_shards,
        "placement": placement,
        "tiers": None if tiers is None else tier_limits(tiers),
        "routing": routing,
        "max_pages": max_pages,
    }
    try:
        result = _run_demo(given, storage, as_json)
    except InputError as error:
        raise _failure(2, str(error)) from None
    if not result.agree:
        raise _failure(1, result.describe_disagreement())


@bench.command()
def decode(
    device: Annotated[str, typer.Option(help="Where to measure; cpu is the only choice in this release.")] = "cpu",
    contexts: Annotated[list[int] | None, typer.Option("--tokens", help="Cached tokens; may be repeated.")] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Rows; may be repeated.")] = None,
    codecs: Annotated[
        list[str] | None, typer.Option("--codec", help="Codec of keys and values; may be repeated, or be all.")
    ] = None,
    routing: Annotated[str, typer.Option(help="Which pages are read: all, or a policy.")] = "all",
    max_pages: Annotated[int, typer.Option(help="Of full pages, the most that a KV head reads.")] = 64,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """One decoding step of one layer: 32 query and 4 KV heads, head dim 128, fp32, expert placement."""
    if device != "cpu":
        raise _failure(2, f"--device must be cpu in this release, got {device!r}; `make gpu-check` measures on a GPU")
    names = list(CODECS) if codecs == ["all"] else codecs or ["none"]
    try:
        with user_input("invalid option"):
            for name in names:
                PiKVConfig(key_codec=name, routing=routing, max_pages=max_pages)
    except InputError as error:
        raise _failure(2, str(error)) from None
    from pikv_hf.eval.bench.bench_table import run_and_show
    from pikv_hf.eval.bench.decode import run_decode

    sizes = contexts or (4096, 32768, 131072), batches or (1, 4)
    cases = run_decode(*sizes, codecs=names, routing=routing, max_pages=max_pages)
    run_and_show(cases, threads, output)


@bench.command()
def reorder(
    beams: Annotated[int, typer.Option(help="Rows.")] = 8,
    tokens: Annotated[int, typer.Option(help="Cached tokens of each row.")] = 32768,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Beam reordering of one layer, for beams of one prompt and for rows that share nothing."""
    from pikv_hf.eval.bench.bench_table import run_and_show
    from pikv_hf.eval.bench.decode import run_reorder

    run_and_show(run_reorder(beams, tokens), threads, output)


@bench.command()
def prefill(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8192,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """A prompt through a model of two layers, from embeddings to stored pages."""
    from pikv_hf.eval.bench.bench_table import run_and_show
    from pikv_hf.eval.bench.decode import run_prefill

    run_and_show(run_prefill(tokens), threads, output)


@bench.command()
def press(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 8192,
    ratio: Annotated[float, typer.Option(help="Share of the cache that presses remove.")] = 0.75,
    presses: Annotated[
        list[str] | None, typer.Option("--press", help="Only this one, any that pikv eval takes; may be repeated.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Rounds in which every press reads the prompt once.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """What each press of this project adds to the prefill of a model of two layers on PiKVCache."""
    from pikv_hf.eval.bench.bench_table import run_and_show_presses
    from pikv_hf.eval.bench.press_prefill import PRESSES, run_presses

    try:
        timings = run_presses(tokens, ratio, repeats, presses or PRESSES)
    except InputError as error:
        raise _failure(2, str(error)) from None
    run_and_show_presses(timings, threads, output)


@bench.command()
def generate(
    tokens: Annotated[int, typer.Option(help="To generate.")] = 4096,
    prompt: Annotated[int, typer.Option(help="Length of the prompt.")] = 1024,
    budget: Annotated[int, typer.Option(help="Tokens that each layer may keep.")] = 1024,
    schedulers: Annotated[
        list[str] | None, typer.Option("--scheduler", help="Which pages go first; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """A long generation under a budget: is a late step as fast, and the cache as small, as an early one."""
    _check_schedulers(schedulers)
    from pikv_hf.eval.bench.generation import run_and_show_generation, run_generation

    run_and_show_generation(run_generation(tokens, prompt, budget, schedulers or ["pikv"]), threads, output)


@bench.command()
def chunks(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 32768,
    chunk: Annotated[int, typer.Option(help="Tokens per call.")] = 1024,
    budget: Annotated[float, typer.Option(help="Share of the tokens that may be kept.")] = 0.25,
    schedulers: Annotated[
        list[str] | None, typer.Option("--scheduler", help="Which pages go first; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """A prompt read in chunks under a budget: the most bytes that the cache ever takes."""
    _check_schedulers(schedulers)
    from pikv_hf.eval.bench.generation import run_and_show_chunks, run_chunks

    run_and_show_chunks(run_chunks(tokens, chunk, budget, schedulers or ["pikv"]), threads, output)


def _check_schedulers(names: list[str] | None) -> None:
    try:
        with user_input("invalid --scheduler"):
            for name in names or ():
                PiKVConfig(budget=0.5, scheduler=name)
    except InputError as error:
        raise _failure(2, str(error)) from None


@bench.command()
def load(
    tokens: Annotated[int, typer.Option(help="Length of the context.")] = 32768,
    codecs: Annotated[
        list[str] | None, typer.Option("--codec", help="Codec of keys and values; may be repeated.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 2,
    chunk: Annotated[int | None, typer.Option(help="Tokens read per call; by default all at once.")] = None,
    repeats: Annotated[int, typer.Option(help="Times that a file is saved and loaded.")] = 5,
    directory: Annotated[Path | None, typer.Option(help="Where the file goes; by default a temporary one.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Saving and loading the cache of a context, against reading the context again."""
    names = codecs or ["none", "int4"]
    try:
        with user_input("invalid option"):
            for name in names:
                PiKVConfig(key_codec=name)
    except InputError as error:
        raise _failure(2, str(error)) from None
    from pikv_hf.eval.bench.saved_cache import run_and_show_loads, run_load

    run_and_show_loads(run_load(tokens, names, layers, repeats, chunk, directory), threads, output)


@bench.command()
def processes(
    count: Annotated[int, typer.Option("--processes", help="Gloo processes, of one thread each.")] = 2,
    contexts: Annotated[list[int] | None, typer.Option("--tokens", help="Cached tokens; may be repeated.")] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", help="Rows; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """One decoding step of one layer whose shards are spread over processes, against one process of one thread."""
    if count < 2:
        raise _failure(2, f"--processes must be at least 2, got {count}")
    from pikv_hf.eval.bench.processes import run_and_show_processes, run_processes

    run_and_show_processes(run_processes(count, contexts or (512, 4096, 32768, 131072), batches or (1,)), output)


def _run_demo(given: dict[str, Any], storage: dict[str, Any], as_json: bool) -> "DemoResult":
    """Run the demo and print its result."""
    with user_input("invalid option"):
        options = DemoOptions(**given, pikv=PiKVConfig.from_dict(storage))
    from pikv_hf.eval.demo.demo import run_demo
    from pikv_hf.eval.demo.view import print_json, print_result, working

    with working(quiet=as_json):
        result = run_demo(options)
    (print_json if as_json else print_result)(result)
    return result


def _failure(status: int, message: str) -> typer.Exit:
    typer.echo(f"Error: {message}", err=True)
    return typer.Exit(status)
