"""Runs the scenarios of tests/distributed/test_processes.py in several processes at once.

One process imports everything and forks the others, which takes 0.1 s instead of the 5 s of imports; they find each
other through a file. `python -P process_runs.py FOLDER` does all of it and leaves a file of results for each process.
"""

import datetime
import functools
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from process_failures import FAILURES
from process_scenarios import AS_IN_ONE, ASSISTED, EXACT, NOT_EIGHT, ON_FOUR, STORED, Scenario, Spread
from process_traffic import MEMORY, TRAFFIC

import pikv_hf.page_table.table_view
from pikv_hf.kernels import append_newest, expert_writer
from pikv_hf.kernels.dispatch import choose

os.environ.setdefault("HF_HUB_OFFLINE", "1")
#: A group of processes that is not through after this many seconds is killed.
LIMIT = 300


def run_scenarios(names: Iterable[str], spread: Spread, known: dict[str, Scenario]) -> dict[str, Any]:
    """Run some scenarios; what one raises is its result."""
    results: dict[str, Any] = {}
    for name in names:
        if dist.is_initialized():
            # What one raises may leave processes apart.
            dist.barrier()
        began = time.perf_counter()
        try:
            results[name] = known[name](spread)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = time.perf_counter() - began
    return results


def forked(work: Callable[[], Any], file: Path) -> int:
    """Run something in a process of its own and save what it returns; returns the number of the process."""
    if child := os.fork():
        return child
    status = 1
    try:
        # Whatever it waits for, it ends.
        signal.alarm(LIMIT)
        result = work()
        torch.save(result, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def group(world: int, folder: Path, name: str, work: Callable[[int], Any]) -> list[int]:
    """Start processes that find each other through a file; `work` gets the rank."""

    def begin(rank: int) -> Any:
        where = f"file://{folder / name}.store"
        wait = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=wait)
        return work(rank)

    return [forked(functools.partial(begin, rank), folder / f"{name}-{rank}.pt") for rank in range(world)]


def wait_for(children: list[int]) -> None:
    """Wait until all are through, and kill what is not in time."""
    end, left = time.monotonic() + LIMIT, set(children)
    while left and time.monotonic() < end:
        left -= {child for child in left if os.waitpid(child, os.WNOHANG)[0]}
        time.sleep(0.05)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def scenarios_of(world: int) -> dict[str, Scenario]:
    """Return what so many processes run."""
    if world == 8:
        return {**{name: EXACT[name] for name in EXACT if name not in NOT_EIGHT}, **MEMORY}
    if world == 4:
        return {**EXACT, **{name: STORED[name] for name in ON_FOUR}, **MEMORY}
    return {**EXACT, **ASSISTED, **STORED, **MEMORY, **TRAFFIC}


def compile_kernels() -> None:
    """Compile what the children share, which each of them would otherwise do while others wait for it."""
    if choose(torch.device("cpu"), compiled=True) != "numba":
        return
    from pikv_hf.kernels import numba_decode_kernel, numba_tiles

    for width in numba_tiles.WIDTHS:
        numba_decode_kernel.compiled(width)
    keys, numbers, slots = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    append_newest(keys, keys.clone(), numbers.int(), slots, 0, keys, keys, 0)
    expert_writer(numbers.short(), slots)(0, slots)


def main(folder: Path, only: list[str]) -> None:
    """Run everything, or what is named."""
    torch.set_num_threads(1)
    compile_kernels()
    pikv_hf.page_table.table_view.MIN_RUN_BYTES = 1
    # The children share what is imported, which their collectors need not look through.
    gc.freeze()
    everything = {**EXACT, **ASSISTED, **STORED, **MEMORY, **TRAFFIC}

    def chosen(names: Iterable[str]) -> list[str]:
        return [name for name in names if not only or name in only]

    def here(names: Iterable[str], **spread: Any) -> dict[str, Any]:
        return run_scenarios(chosen(names), spread, everything)

    def devices(world: int) -> list[int]:
        names = [name for name in scenarios_of(world) if name in STORED]
        work = functools.partial(here, names, devices=[f"cpu:{number}" for number in range(world)])
        return [forked(work, folder / f"devices-{world}.pt")]

    def there(rank: int, world: int) -> dict[str, Any]:
        return run_scenarios(chosen(scenarios_of(world)), {"process_group": "world", "timeout": 30.0}, everything)

    decoding = [*EXACT, *ASSISTED]
    wait_for(
        [
            forked(functools.partial(here, decoding, dynamic=True), folder / "dynamic.pt"),
            forked(functools.partial(here, [*decoding, *AS_IN_ONE, *MEMORY]), folder / "one.pt"),
            *devices(2),
            *group(2, folder, "world-2", functools.partial(there, world=2)),
        ]
    )
    wait_for([*devices(4), *group(4, folder, "world-4", functools.partial(there, world=4))])
    wait_for(group(8, folder, "world-8", functools.partial(there, world=8)))
    names = chosen(FAILURES)
    for first in range(0, len(names), 7):
        children: list[int] = []
        for name in names[first : first + 7]:
            children += group(FAILURES[name].world, folder, name, FAILURES[name].run)
        wait_for(children)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
