"""``pikv bench``: speed and bytes of the cache against transformers' `DynamicCache` in the same run."""

from pathlib import Path
from typing import Annotated

import typer

from pikv_hf.config import CODECS, PiKVConfig
from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.runner.options import MOST_THREADS

app = typer.Typer(help="Measure the cache against transformers' DynamicCache in the same run.", no_args_is_help=True)


@app.command()
def decode(
    device: Annotated[str, typer.Option(help="Where to measure; cpu is the only choice in this release.")] = "cpu",
    contexts: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Cached tokens; may be repeated.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Rows; may be repeated.")] = None,
    codecs: Annotated[
        list[str] | None, typer.Option("--codec", help="Codec of keys and values; may be repeated, or be all.")
    ] = None,
    routing: Annotated[str, typer.Option(help="Which pages are read: all, or a policy.")] = "all",
    max_pages: Annotated[int, typer.Option(min=1, help="Of full pages, the most that a KV head reads.")] = 64,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """One decoding step of one layer: 32 query and 4 KV heads, head dim 128, fp32, expert placement."""
    if device != "cpu":
        raise InputError(f"--device must be cpu in this release, got {device!r}; `make gpu-check` measures on a GPU")
    names = list(CODECS) if codecs == ["all"] else codecs or ["none"]
    with user_input("invalid option"):
        for name in names:
            PiKVConfig(key_codec=name, routing=routing, max_pages=max_pages)
    from pikv_hf.eval.bench.bench_table import run_and_show
    from pikv_hf.eval.bench.decode import run_decode

    sizes = contexts or (4096, 32768, 131072), batches or (1, 4)
    cases = run_decode(*sizes, codecs=names, routing=routing, max_pages=max_pages)
    run_and_show(cases, threads, output)


@app.command()
def steps(
    cases: Annotated[
        list[str] | None,
        typer.Option("--case", help="geometry, small, ragged, beams or prefill; may be repeated. All by default."),
    ] = None,
    contexts: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Cached tokens; may be repeated.")
    ] = None,
    caches: Annotated[
        list[str] | None,
        typer.Option(
            "--cache",
            help="dynamic, exact, int8, int4, press:0.25 (this share of the bytes, by PiKVPress), kept:0.25 (this share"
            " of the tokens, on a DynamicCache); may be repeated.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="To spend on the steps of each case and context.")] = 20.0,
    turn: Annotated[int, typer.Option(min=1, help="Steps that each cache takes in a row.")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Decoding steps of whole models, several caches in turn: Qwen3-30B-A3B's attention, and SmolLM2-135M's shape."""
    from pikv_hf.eval.bench.step_caches import check_cache
    from pikv_hf.eval.bench.step_table import run_and_show_steps
    from pikv_hf.eval.bench.steps import CASES, run_steps

    if unknown := set(cases or ()) - set(CASES):
        raise InputError(f"--case must be one of {', '.join(CASES)}, got {sorted(unknown)[0]!r}")
    for name in caches or ():
        check_cache(name)
    chosen = [list(dict.fromkeys(given or ())) for given in (cases or CASES, caches)]
    run_and_show_steps(run_steps(chosen[0], contexts or (), chosen[1], seconds, turn), threads, output)


@app.command()
def reorder(
    beams: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Cached tokens of each row.")] = 32768,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Beam reordering of one layer, for beams of one prompt and for rows that share nothing."""
    from pikv_hf.eval.bench.bench_table import run_and_show
    from pikv_hf.eval.bench.decode import run_reorder

    run_and_show(run_reorder(beams, tokens), threads, output)


@app.command()
def mla(
    contexts: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Cached tokens; may be repeated.")
    ] = None,
    cases: Annotated[
        list[str] | None, typer.Option("--case", help="exact, int8, int4 or page_bound; may be repeated.")
    ] = None,
    indexer: Annotated[
        bool, typer.Option("--indexer", help="DeepSeek-V3.2, whose indexer chooses 2,048 tokens for each query.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of the model: float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """One decoding step of one layer of latent attention at DeepSeek-V3's geometry, 128 heads, projections included."""
    from pikv_hf.eval.bench.bench_table import run_and_show
    from pikv_hf.eval.bench.latent_decode import CASES, INDEXED_CASES, has_indexers, run_latent_decode

    if indexer and not has_indexers():
        raise InputError("--indexer needs a transformers that has DeepSeek-V3.2, 5.24 say")
    known = INDEXED_CASES if indexer else tuple(CASES)
    if unknown := set(cases or ()) - set(known):
        raise InputError(f"--case must be one of {', '.join(known)}, got {sorted(unknown)[0]!r}")
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    sizes, names = contexts or (2048, 8192, 32768), cases or list(known)
    run_and_show(run_latent_decode(sizes, names, dtype=dtype, indexed=indexer), threads, output)


@app.command()
def prefill(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 8192,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """A prompt through a model of two layers, from embeddings to stored pages."""
    from pikv_hf.eval.bench.bench_table import run_and_show
    from pikv_hf.eval.bench.decode import run_prefill

    run_and_show(run_prefill(tokens), threads, output)


@app.command()
def press(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 8192,
    ratio: Annotated[float, typer.Option(help="Share of the cache that presses remove.")] = 0.75,
    presses: Annotated[
        list[str] | None, typer.Option("--press", help="Only this one, any that pikv eval takes; may be repeated.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="smollm2, smollm2-moe, a folder or a Hub name reads prose; by default two layers."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which every press reads the prompt once.")] = 5,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """What each press of this project adds to a prefill on PiKVCache: of a model of two layers, or of yours."""
    from pikv_hf.eval.bench.bench_table import run_and_show_presses
    from pikv_hf.eval.bench.press_prefill import PRESSES, run_presses

    timings = run_presses(tokens, ratio, repeats, presses or PRESSES, model)
    run_and_show_presses(timings, threads, output)


@app.command()
def generate(
    tokens: Annotated[int, typer.Option(min=1024, help="To generate.")] = 4096,
    prompt: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 1024,
    budget: Annotated[int, typer.Option(min=1, help="Tokens that each layer may keep.")] = 1024,
    schedulers: Annotated[
        list[str] | None, typer.Option("--scheduler", help="Which pages go first; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """A long generation under a budget: is a late step as fast, and the cache as small, as an early one."""
    _check_schedulers(schedulers)
    from pikv_hf.eval.bench.generation import run_and_show_generation, run_generation

    run_and_show_generation(run_generation(tokens, prompt, budget, schedulers or ["pikv"]), threads, output)


@app.command()
def chunks(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 32768,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per call.")] = 1024,
    budget: Annotated[float, typer.Option(help="Share of the tokens that may be kept.")] = 0.25,
    schedulers: Annotated[
        list[str] | None, typer.Option("--scheduler", help="Which pages go first; may be repeated.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """A prompt read in chunks under a budget: the most bytes that the cache ever takes."""
    _check_schedulers(schedulers)
    from pikv_hf.eval.bench.generation import run_and_show_chunks, run_chunks

    run_and_show_chunks(run_chunks(tokens, chunk, budget, schedulers or ["pikv"]), threads, output)


def _check_schedulers(names: list[str] | None) -> None:
    with user_input("invalid --scheduler"):
        for name in names or ():
            PiKVConfig(budget=0.5, scheduler=name)


@app.command()
def load(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the context.")] = 32768,
    codecs: Annotated[
        list[str] | None, typer.Option("--codec", help="Codec of keys and values; may be repeated.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")] = 2,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens read per call; by default all at once.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that a file is saved and loaded.")] = 5,
    directory: Annotated[Path | None, typer.Option(help="Where the file goes; by default a temporary one.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Saving and loading the cache of a context, against reading the context again."""
    names = codecs or ["none", "int4"]
    with user_input("invalid option"):
        for name in names:
            PiKVConfig(key_codec=name)
    if directory is not None and not directory.is_dir():
        raise InputError(f"--directory {directory}: no such folder")
    from pikv_hf.eval.bench.saved_cache import run_and_show_loads, run_load

    run_and_show_loads(run_load(tokens, names, layers, repeats, chunk, directory), threads, output)


@app.command()
def store(
    prefixes: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Of a known prefix; may be repeated.")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Of the model that reads it.")] = 2,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens that it reads per call.")] = 4096,
    directory: Annotated[Path | None, typer.Option(help="Where files go; by default a temporary folder.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """What a store of contexts saves: first tokens after known prefixes, lookups, misses, and conversations."""
    if directory is not None and not directory.is_dir():
        raise InputError(f"--directory {directory}: no such folder")
    from pikv_hf.eval.bench.context_reuse import run_and_show_store, run_store

    run_and_show_store(run_store(prefixes or (8192, 32768), layers, chunk, directory), threads, output)


@app.command()
def processes(
    count: Annotated[int, typer.Option("--processes", min=2, max=64, help="Gloo processes, of one thread each.")] = 2,
    contexts: Annotated[
        list[int] | None, typer.Option("--tokens", min=1, help="Cached tokens; may be repeated.")
    ] = None,
    batches: Annotated[list[int] | None, typer.Option("--batch", min=1, help="Rows; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """One decoding step of one layer whose shards are spread over processes, against one process of one thread."""
    from pikv_hf.eval.bench.processes import run_and_show_processes, run_processes

    run_and_show_processes(run_processes(count, contexts or (512, 4096, 32768, 131072), batches or (1,)), output)
