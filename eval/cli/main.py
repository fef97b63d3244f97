"""The command ``pikv`` and its subcommands, which import what they need when they run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pikv_hf.config import PiKVConfig
from pikv_hf.eval.cli.bench_command import app as bench
from pikv_hf.eval.cli.border import FAILED
from pikv_hf.eval.cli.chat_command import chat
from pikv_hf.eval.cli.command_group import CommandGroup
from pikv_hf.eval.cli.eval_command import app as evaluation
from pikv_hf.eval.cli.plan_command import plan
from pikv_hf.eval.cli.report_command import app as report
from pikv_hf.eval.cli.scbench_command import scbench
from pikv_hf.eval.cli.store_command import app as store
from pikv_hf.eval.demo.options import DemoOptions, tier_limits
from pikv_hf.eval.errors import user_input

if TYPE_CHECKING:
    from pikv_hf.eval.demo.result import DemoResult

app = typer.Typer(
    name="pikv",
    cls=CommandGroup,
    help="PiKV: an exact, expert-sharded, paged KV cache for Mixture-of-Experts models.",
    epilog="PIKV_DEBUG=1 in the environment shows the traceback of every error.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(bench, name="bench")
app.add_typer(evaluation, name="eval")
app.add_typer(report, name="report")
app.add_typer(store, name="store")
_DEFAULT = DemoOptions()


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Folder, Hub name, smollm2 or smollm2-moe; by default the bundled model.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="File to ask about; by default a synthetic haystack.")] = None,
    questions: Annotated[list[str] | None, typer.Option("--question", help="About --text; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(help="Length of the haystack.")] = _DEFAULT.tokens,
    seed: Annotated[int, typer.Option(help="Of the haystack.")] = _DEFAULT.seed,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of each answer.")] = _DEFAULT.max_new_tokens,
    page_size: Annotated[int, typer.Option(help="Tokens per page.")] = _DEFAULT.pikv.page_size,
    recent_window: Annotated[int, typer.Option(help="Newest tokens, not in a shard.")] = _DEFAULT.pikv.recent_window,
    sink_tokens: Annotated[int, typer.Option(help="First tokens, not in a shard.")] = _DEFAULT.pikv.sink_tokens,
    num_shards: Annotated[int, typer.Option(help="Groups of experts.")] = _DEFAULT.pikv.num_shards,
    placement: Annotated[
        str | None,
        typer.Option(help="expert or balanced (by router), or hash (by position); by default expert if there is one."),
    ] = None,
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
    """Ask several questions about one text with DynamicCache and with PiKVCache: exact, int4 and with PiKVPress.

    Without options it needs no network: a small bundled model looks up
    numbers in 2,048 tokens of synthetic text.

    The exit status is 1 if any token differs between the exact PiKVCache
    and DynamicCache, 2 if an option cannot be used.
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
    result = _run_demo(given, storage, as_json)
    if not result.agree:
        typer.echo(f"Error: {result.describe_disagreement()}", err=True)
        raise typer.Exit(FAILED)


app.command()(plan)
app.command()(chat)
evaluation.command()(scbench)


@app.command()
def version() -> None:
    """Print the version."""
    from pikv_hf.version import __version__

    typer.echo(__version__)


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
