"""Run random programs for as long as told, print each failure as a script, and count what came of them."""

import argparse
import collections
import faulthandler
import json
import random
import subprocess
import time
from pathlib import Path

import torch
from program_draw import Program, draw_program
from program_models import quiet
from program_run import Report, run
from program_script import script
from program_shrink import shrunk

import pikv_hf.page_table.table_view


def one(seed: int) -> tuple[Program, Report]:
    """Draw and run the program of a seed."""
    program = draw_program(random.Random(seed).choice)
    return program, run(program)


def _log(path: Path | None, entry: dict[str, object]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on (default: 1)")
    parser.add_argument("--programs", type=int, default=10**9, help="or how many programs to run")
    parser.add_argument("--seed", type=int, default=None, help="of the first program (default: random)")
    parser.add_argument("--log", type=Path, default=None, help="append counts and failures to this JSONL file")
    parser.add_argument("--each", type=int, default=1, help="how many failures of a kind to print")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    pikv_hf.page_table.table_view.MIN_RUN_BYTES = 1
    seed = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    ends: collections.Counter[str] = collections.Counter()
    begin = time.time()
    commit = _commit()
    for number in range(options.programs):
        if time.time() - begin > 60 * options.minutes:
            break
        faulthandler.dump_traceback_later(180, exit=True)
        program, report = one(seed + number)
        counts["programs"] += 1
        counts["calls"] += report.calls
        counts[report.ends] += 1
        if report.ends.endswith(("fail", "fails")):
            ends[f"{report.ends}: {report.why[:100]}"] += 1
        for kind in report.refused:
            counts[f"refused: {kind}"] += 1
        if report.failure is not None:
            kinds[report.kind] += 1
            if kinds[report.kind] <= options.each:
                faulthandler.dump_traceback_later(600, exit=True)
                small = shrunk(program, lambda other, kind=report.kind: run(other).kind == kind)
                found = run(small)
                text = script(small, found.texts, f"{found.kind}\n\nSeed {seed + number}. {found.failure}"[:2000])
                print("\n" + "#" * 100 + "\n" + text, flush=True)
                _log(options.log, {"commit": commit, "seed": seed + number, "kind": report.kind, "script": text})
    took = time.time() - begin
    _log(options.log, {"commit": commit, "seed": seed, "seconds": round(took), **counts, "kinds": dict(kinds)})
    print("\n" + "#" * 100)
    programs = counts["programs"]
    print(f"{programs} programs from seed {seed} in {took:.0f} s, {took / max(1, programs):.3f} s each")
    for name, count in counts.most_common():
        print(f"{count:8} {name}")
    for name, count in ends.most_common():
        print(f"{count:8} {name}")
    for name, count in kinds.most_common():
        print(f"{count:8} FAIL {name}")


if __name__ == "__main__":
    main()
