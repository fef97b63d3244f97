"""Imports go down only: no file imports one of a floor above its own, and no files or folders import each other."""

import ast
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "pikv_hf": "src/pikv_hf",
    "pikv_hf.kernels": "kernels",
    "pikv_hf.presses": "presses",
    "pikv_hf.eval": "eval",
}

#: Folders and files of `pikv_hf` from top to bottom; those of one line know nothing of one another. A folder has what
#: is in it and not listed by itself. Imports within functions and those for type checking count.
FLOORS = """
.eval.gpu
.eval.__main__
.eval.studies .eval.training
.eval.cli
.eval.bench .eval.demo .eval.report
.eval
.eval.runner
.eval.real_model
.eval.tasks
.eval.tasks.ruler .eval.tasks.longbench
.eval.tasks.frame
.eval.tasks.sample
.eval.metrics .eval.reference
.eval.hub .eval.output_files
.eval.errors .eval.provenance
.presses
.
.planning .store
.cache
.serialization
.integration
.reports
.layer
.attention
.scheduling
.scheduling.policies
.routing
.page_table
.tiers
.pages
.codecs
.config
.distributed
.sharding
.allocation
.common
.kernels
.version
"""
FLOOR_OF = {f"pikv_hf{name}".rstrip("."): at for at, line in enumerate(FLOORS.split("\n")) for name in line.split()}

Pairs = set[tuple[str, str]]


def imports() -> Pairs:
    """Return pairs of modules of which the first imports the second."""
    trees, pairs = {}, set()
    for package, folder in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            name = ".".join((package, *file.relative_to(ROOT / folder).with_suffix("").parts))
            inside = name.rpartition(".")[0]
            trees[name.removesuffix(".__init__")] = inside, ast.parse(file.read_text(encoding="utf-8"))
    for name, (inside, tree) in trees.items():
        for node in ast.walk(tree):
            source = ""
            if isinstance(node, ast.ImportFrom):
                source = resolve_name("." * node.level + (node.module or ""), inside) + "."
            for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
                path = source + alias.name
                while path and path not in trees:
                    path = path.rpartition(".")[0]
                pairs |= {(name, path)} if path not in ("", name) else set()
    return pairs


def entry(name: str) -> str:
    """Return what stands for a module in `FLOORS`."""
    return name if name in FLOOR_OF else entry(name.rpartition(".")[0])


def upward(pairs: Pairs) -> Pairs:
    entries = {pair: (entry(pair[0]), entry(pair[1])) for pair in pairs}
    return {pair for pair, (one, other) in entries.items() if one != other and FLOOR_OF[one] >= FLOOR_OF[other]}


def circular(pairs: Pairs) -> Pairs:
    """Return the pairs from whose second there is a way back to their first."""
    below = {name: {other for one, other in pairs if one == name} for pair in pairs for name in pair}
    for middle, further in below.items():
        for reached in below.values():
            reached |= further if middle in reached else set()
    return {(one, other) for one, other in pairs if one in below[other]}


def folders(pairs: Pairs) -> Pairs:
    """Return pairs of folders on one floor, of which files of the first import files of the second."""
    alike = {(a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in pairs if entry(a) == entry(b)}
    return {(one, other) for one, other in alike if one != other}


def test_imports_go_down() -> None:
    pairs = imports()
    wrong = upward(pairs) | circular(pairs - upward(pairs)) | circular(folders(pairs))
    assert not wrong, "these go up or in a circle"
