"""Run every decoder of the installed transformers with this cache, and write what became of each."""

import argparse
import dataclasses
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from pikv_hf.eval.report.result_rows import write_rows
from pikv_hf.eval.studies.models.families import Family, families
from pikv_hf.eval.studies.models.outcome import Outcome, outcome_of

#: Seconds after which a model is given up.
PATIENCE = 180.0
FOLDER = Path("eval/results/models")


def results_file(folder: Path) -> Path:
    """Return where the results with the installed release go."""
    return folder / f"transformers-{transformers.__version__}.json"


def read_outcomes(file: Path) -> dict[str, Outcome]:
    """Return the outcomes of a results file by the family's name."""
    rows = json.loads(file.read_text(encoding="utf-8"))["families"]
    return {row["family"]: Outcome(**row) for row in rows}


def main() -> None:
    """Run the families and write their outcomes; those that are not run keep what the file has of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="their names; all by default")
    parser.add_argument("--output", type=Path, default=FOLDER, help="the folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = families()
    chosen = [name for name in options.families or known if name in known]
    for name in set(options.families) - set(chosen):
        print(f"transformers {transformers.__version__} has no {name}")
    file = results_file(options.output)
    outcomes = read_outcomes(file) if options.families and file.exists() else {}
    for outcome in run([known[name] for name in chosen]):
        outcomes[outcome.family] = outcome
        equal = sum(how == "same" for how in outcome.strategies.values())
        print(f"{outcome.family}: {outcome.way}, {equal} of {len(outcome.strategies)} same", flush=True)
        for name, how in outcome.strategies.items():
            if how != "same":
                print(f"    {name}: {how}", flush=True)
        _write(file, outcomes, known)


def _write(file: Path, outcomes: dict[str, Outcome], known: dict[str, Family]) -> None:
    """Write what is known so far, so that a run that is stopped is not lost."""
    about = {
        "metric": "tokens and logits equal to DynamicCache's",
        "with_experts": [name for name, family in known.items() if family.experts],
    }
    write_rows(file, about, {"families": [dataclasses.asdict(outcomes[name]) for name in sorted(outcomes)]})


def run(chosen: list[Family]) -> Iterator[Outcome]:
    """Yield the outcome of each family, run in a process of its own: one that hangs or dies harms no other."""
    context = multiprocessing.get_context("fork")
    for family in chosen:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_send, args=(sender, family))
        child.start()
        sender.close()
        try:
            yield receiver.recv() if receiver.poll(PATIENCE) else _lost(family, f"took more than {PATIENCE:.0f} s")
        except EOFError:
            yield _lost(family, "its process died")
        finally:
            child.kill()
            child.join()


def _send(sender: Any, family: Family) -> None:
    sender.send(outcome_of(family))


def _lost(family: Family, why: str) -> Outcome:
    return Outcome(family.name, "not run", why)


if __name__ == "__main__":
    main()
