"""Run random programs for as long as told, print each kind of failure as a script, and count what came of them."""

import argparse
import collections
import faulthandler
import json
import multiprocessing
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from program_draw import LEFT_OUT, Program, draw_program
from program_models import quiet
from program_run import Report, run
from program_script import script
from program_shrink import shrunk

import pikv_hf.page_table.table_view

#: Seconds after which a program that hangs is shown, and ends the run.
HANGS = 600


class Fuzzing:
    """Random programs of consecutive seeds, and what came of them.

    Parameters
    ----------
    seed : int
        Of the first program.
    log : Path or None
        Where a line goes for each kind of failure, and one with all counts at the end.
    """

    def __init__(self, seed: int, log: Path | None) -> None:
        self.seed, self.log = seed, log
        self.counts: collections.Counter[str] = collections.Counter()
        self.kinds: collections.Counter[str] = collections.Counter()
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        self.commit = done.stdout.strip()

    def write(self, **entry: Any) -> None:
        """Append a line to the log."""
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(json.dumps({"commit": self.commit, **entry}) + "\n")

    def go_on(self, minutes: float, programs: int) -> None:
        """Run as many programs, or for as long."""
        begin = time.time()
        try:
            for seed in range(self.seed, self.seed + programs):
                if time.time() - begin > 60 * minutes:
                    break
                faulthandler.dump_traceback_later(HANGS, exit=True)
                program = draw_program(random.Random(seed).choice)
                self.count(seed, program, run(program))
        except KeyboardInterrupt:
            print("interrupted")
        seconds = round(time.time() - begin)
        self.write(seed=self.seed, seconds=seconds, **self.counts, kinds=dict(self.kinds))
        self.summarize(seconds)

    def count(self, seed: int, program: Program, report: Report) -> None:
        """Note what came of a program; print what it failed in if that is new."""
        self.counts.update(["programs", report.ends, *(f"refused: {kind}" for kind in report.refused)])
        self.counts["calls"] += report.calls
        if report.why:
            self.counts[f"{report.ends}: {report.why[:100]}"] += 1
        if report.failure is None:
            return
        self.kinds[report.kind] += 1
        if self.kinds[report.kind] == 1:
            small = shrunk(program, lambda other: run(other).kind == report.kind)
            found = run(small)
            text = script(small, found.texts, f"Seed {seed}: {found.failure}"[:2000])
            print("\n" + "#" * 100 + "\n" + text, flush=True)
            self.write(seed=seed, kind=report.kind, script=text)

    def summarize(self, seconds: int) -> None:
        """Print all counts."""
        print("\n" + "#" * 100)
        print(f"{self.counts['programs']} programs from seed {self.seed} on in {seconds} s")
        print("\n".join(f"{count:8} {name}" for name, count in self.counts.most_common() if name != "programs"))
        print("\n".join(f"{count:8} FAIL {kind}" for kind, count in self.kinds.most_common()))


def fuzz(seed: int, options: argparse.Namespace) -> None:
    """Run programs in this process."""
    quiet()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # As in the tests: the pages of small models are so small that none would be read in place.
    pikv_hf.page_table.table_view.MIN_RUN_BYTES = 1
    fuzzing = Fuzzing(seed, options.log)
    fuzzing.go_on(options.minutes, options.programs)
    sys.exit(1 if fuzzing.kinds else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1e9, help="how long to go on")
    parser.add_argument("--programs", type=int, default=10**9, help="how many programs to run, in each process")
    parser.add_argument("--processes", type=int, default=1, help="how many processes, each with seeds of its own")
    parser.add_argument("--seed", type=int, default=None, help="of the first program (default: random)")
    parser.add_argument("--log", type=Path, default=None, help="append counts and failures to this JSONL file")
    options = parser.parse_args()
    for call, argument, choice, why in LEFT_OUT:
        print(f"left out: {call} {argument}={choice!r}: {why}" if argument else f"left out: {call}: {why}")
    first = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    if options.processes == 1:
        fuzz(first, options)
    processes = [
        multiprocessing.get_context("spawn").Process(target=fuzz, args=(first + number * 10**9, options))
        for number in range(options.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(process.exitcode or 0 for process in processes))


if __name__ == "__main__":
    main()
