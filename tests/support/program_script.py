"""A program as a script that a person can paste and run."""

import pprint

from program_draw import Program

HEADER = '''"""{what}

Run it from the repository's root: PYTHONPATH=src:tests/support python -P this_file.py
"""

from program_words import *
from program_side_by_side import side_by_side


def program(model, cache, fresh, assistant, show, pikv):
    ids, mask, kept = tokens({batch}, 0, 0), ones({batch}, 0), None
'''


def script(program: Program, texts: list[str], what: str) -> str:
    """Return a script that runs these lines on both caches and prints what they show."""
    lines = [line for text in texts for line in text.split("\n")]
    body = "\n".join("    " + line for line in lines)
    cache = {"attached": program.attached, "devices": program.devices, "options": program.options}
    arguments = "".join(f", {name}={pprint.pformat(value, width=10**6)}" for name, value in cache.items())
    models = (program.family, program.all_experts, program.attention)
    call = f"side_by_side(program, {models}{arguments})"
    return HEADER.format(what=what, batch=program.batch) + body + f"\n\n\n{call}\n"
