"""Write docs/models.md from the results with each release of transformers."""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from packaging.version import Version

from pikv_hf.eval.output_files import write_file
from pikv_hf.eval.studies.models.families import DENSE
from pikv_hf.eval.studies.models.outcome import SAME, WAYS, Outcome
from pikv_hf.eval.studies.models.run import FOLDER, read_outcomes

PAGE = Path("docs/models.md")
#: Between these the tables are written; what is around them is not touched.
BEGIN, END = "<!-- written by make models -->", "<!-- end -->"
SIGNS = {"in place": "in place", "densely": "dense", "own layers": "own", "refused": "refused", "not run": "not run"}

#: Outcomes by release, then by family.
Results = dict[str, dict[str, Outcome]]


def read_results(folder: Path) -> Results:
    """Return the outcomes of each release that has results, older ones first."""
    files = {file.stem.removeprefix("transformers-"): file for file in folder.glob("transformers-*.json")}
    return {release: read_outcomes(files[release]) for release in sorted(files, key=Version)}


def experts_of(folder: Path, release: str) -> set[str]:
    """Return the families with experts, as the results of a release name them."""
    return set(json.loads((folder / f"transformers-{release}.json").read_text(encoding="utf-8"))["with_experts"])


def tables(results: Results, experts: set[str]) -> str:
    """Return the tables in Markdown: counts, families with experts, dense ones, all others in a line, and reasons."""
    names = sorted({name for outcomes in results.values() for name in outcomes})
    dense = [name for name in names if name in DENSE and name not in experts]
    others = [name for name in names if name not in experts and name not in dense]
    parts = [
        _summary(results, experts),
        f"### With experts\n\n{_families(results, [name for name in names if name in experts])}",
        f"### Dense models\n\n{_families(results, dense)}",
        f"### All other decoders\n\n{_others(results, others)}",
        f"### Why\n\n{_reasons(results, [name for name in names if name not in others])}",
    ]
    return "\n\n".join(parts)


def _summary(results: Results, experts: set[str]) -> str:
    lines = ["| decoders with experts | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    listed = {
        release: [outcome for name, outcome in outcomes.items() if name in experts]
        for release, outcomes in results.items()
    }
    counts = {
        "tested": lambda outcome: outcome.way != "not run",
        "equal in all strategies": is_exact,
        "of these read in place": lambda outcome: is_exact(outcome) and outcome.way == "in place",
        "of these with their routers followed": lambda outcome: is_exact(outcome) and outcome.placement == "expert",
        "refused, with the reason": lambda outcome: outcome.way == "refused",
        "other tokens than DynamicCache's": is_wrong,
        "not run: DynamicCache fails too, or no small config": lambda outcome: outcome.way == "not run",
    }
    for label, counted in counts.items():
        numbers = [str(sum(map(counted, outcomes))) for outcomes in listed.values()]
        lines.append(f"| {label} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def is_exact(outcome: Outcome) -> bool:
    """Tell whether a family ran and every strategy that DynamicCache manages was equal."""
    return bool(outcome.strategies) and all(how == SAME for how in outcome.strategies.values())


def is_wrong(outcome: Outcome) -> bool:
    """Tell whether a strategy ran and gave other tokens or logits; an error is not wrong."""
    return any(how != SAME and not how.startswith("fails: ") for how in outcome.strategies.values())


def _families(results: Results, names: Iterable[str]) -> str:
    heads = [f"{column} ({release})" for release in results for column in ("K/V", "routers", "equal")]
    lines = ["| family | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in names:
        cells = [cell for outcomes in results.values() for cell in _cells(outcomes.get(name))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(outcome: Outcome | None) -> tuple[str, str, str]:
    """Return how K/V are kept, how many layers have a router that is followed, and how many strategies are equal."""
    if outcome is None:
        return "-", "-", "-"
    if outcome.way in ("refused", "not run"):
        return outcome.way, "", ""
    own = outcome.layers.keys() - {"PiKVLayer", "IndexedLayer", "DynamicSlidingWindowLayer"}
    kept = SIGNS[outcome.way] + (" + own" if own and outcome.way != "own layers" else "")
    routers = f"{outcome.routers}/{sum(outcome.layers.values())}" if outcome.placement == "expert" else "none"
    equal = sum(how == SAME for how in outcome.strategies.values())
    return kept, routers, f"{equal}/{len(outcome.strategies)}" + (" (few tokens)" if outcome.tokens < 3 else "")


def _others(results: Results, names: list[str]) -> str:
    lines = []
    for release, outcomes in results.items():
        for way in reversed(WAYS):
            own = [name for name in names if name in outcomes and outcomes[name].way == way]
            if own:
                lines.append(f"- {release}, {SIGNS[way]}: {', '.join(own)}")
    return "\n".join(lines)


def _reasons(results: Results, names: Iterable[str]) -> str:
    lines = []
    for name in names:
        for release, outcomes in results.items():
            if (outcome := outcomes.get(name)) is None:
                continue
            if outcome.reason:
                lines.append(f"- {name} ({release}), {SIGNS[outcome.way]}: {_plain(outcome.reason)}")
            lines += [
                f"- {name} ({release}), {strategy}: {_plain(how)}"
                for strategy, how in outcome.strategies.items()
                if how != SAME
            ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Return a message without what Markdown would take for its own, and without advice."""
    return re.sub(r"[`|<>]", "", text).partition("; ")[0].replace("_", r"\_").replace("*", r"\*")


def main() -> None:
    """Write the tables into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    results = read_results(options.results)
    experts = set().union(*(experts_of(options.results, release) for release in results))
    page = options.page.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    write_file(options.page, f"{before}{BEGIN}\n\n{tables(results, experts)}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
