"""``pikv eval scbench``: several questions about each context, with a store of contexts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.runner.options import MOST_THREADS


def scbench(
    model: Annotated[
        str, typer.Option(help="reference (bundled), smollm2, smollm2-moe, a folder or a Hub name.")
    ] = "reference",
    data_dir: Annotated[
        str | None, typer.Option(help="Folder of <task>.jsonl or <task>/*.parquet, or 'bundled'; by default the Hub.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Such as scbench_kv; may be repeated.")] = None,
    same_context: Annotated[
        bool, typer.Option("--same-context", help="Each question right after the context, not after those before it.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Most contexts of each task.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Instead of the task's own limit.")] = None,
    store: Annotated[Path | None, typer.Option(help="Folder of contexts; by default memory alone.")] = None,
    budget: Annotated[str | None, typer.Option(help="The most bytes in memory, such as 2GiB.")] = None,
    codec: Annotated[str, typer.Option(help="Of keys and values.")] = "none",
    no_store: Annotated[bool, typer.Option("--no-store", help="Read every prompt, with DynamicCache.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; by default as saved.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; by default a GPU if any.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """SCBench: several questions about one context, multi-turn or multi-request, with tokens read and reused."""
    from pikv_hf.eval.tasks.scbench.records import BUNDLED, read_records
    from pikv_hf.eval.tasks.scbench.sets import TASKS, task_named

    folder = BUNDLED if data_dir == "bundled" else None if data_dir is None else Path(data_dir)
    known = [file.stem for file in sorted(BUNDLED.glob("*.jsonl"))] if folder == BUNDLED else list(TASKS)
    with user_input("cannot read the data"):
        read = {name: (task_named(name), read_records(name, folder, limit)) for name in tasks or known}
    if no_store and (store is not None or budget is not None or codec != "none"):
        raise InputError("--no-store goes without --store, --budget and --codec")
    import torch
    from rich.console import Console

    from pikv_hf import ContextStore
    from pikv_hf.eval.report.result_rows import show_table, write_rows
    from pikv_hf.eval.runner.caches import store_options
    from pikv_hf.eval.runner.models import load_model
    from pikv_hf.eval.runner.quiet import quiet_transformers
    from pikv_hf.eval.runner.shared_contexts import ask_all, summary_of

    with user_input("cannot run"):
        if threads is not None:
            torch.set_num_threads(threads)
        loaded, tokenizer = load_model(model, dtype, device)
        contexts = None if no_store else ContextStore(loaded, budget, path=store, **store_options(loaded, codec))
    rows: list[dict[str, Any]] = []
    with quiet_transformers():
        for name, (task, records) in read.items():
            asked = ask_all(loaded, tokenizer, task, records, contexts, same_context, max_new_tokens)
            rows += [{"task": name, **row} for row in asked]
    summaries = [{"task": name, **summary_of([row for row in rows if row["task"] == name])} for name in read]
    if output is not None:
        about = {"model": model, "dtype": str(loaded.dtype), "same_context": same_context, "store": not no_store}
        write_rows(output, {**about, "codec": codec}, {"tasks": summaries, "questions": rows})
    cells = [
        [
            row["task"],
            str(row["questions"]),
            f"{row['score']:.1f}",
            f"{row['read']:,}",
            f"{row['reused']:,}",
            f"{row['seconds']:.1f}",
        ]
        for row in summaries
    ]
    mode = "multi-request" if same_context else "multi-turn"
    show_table(
        Console(highlight=False), f"SCBench, {mode}", ["task", "questions", "score", "read", "reused", "seconds"], cells
    )
