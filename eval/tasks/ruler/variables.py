"""Variable tracking (`vt`): one chain of five variables with the same value, after a worked example."""

from itertools import islice, pairwise
from random import Random
from string import ascii_uppercase

from pikv_hf.eval.tasks.ruler import templates
from pikv_hf.eval.tasks.ruler.counting import TokenCounter
from pikv_hf.eval.tasks.ruler.fitting import Problem
from pikv_hf.eval.tasks.ruler.scattered import Scattered, noise_lines, random_places, scatter
from pikv_hf.eval.tasks.ruler.words import distinct, random_letters

HOPS = 4
# The worked example has shorter names and at most 500 tokens, of which as many stay free as its answer may have.
_LETTERS, _EXAMPLE_LETTERS = 5, 3
_EXAMPLE_TOKENS = 500


def variable_problem(rng: Random, counter: TokenCounter, length: int) -> Problem:
    """Hide one chain among noise lines, after an example of at most 500 tokens, or of half of a shorter `length`."""
    example = _example(rng, counter, min(_EXAMPLE_TOKENS, length // 2))
    return _chain_problem(rng, counter, length, _LETTERS, f"{example}\n\n{templates.VT_LEAD}")


def _example(rng: Random, counter: TokenCounter, tokens: int) -> str:
    """A smaller problem with its question and answer, as long as `tokens` allow."""
    room = tokens - templates.MAX_NEW_TOKENS["vt"]
    problem = _chain_problem(rng, counter, tokens, _EXAMPLE_LETTERS, templates.VT_LEAD)
    asked = f"{problem.question} {problem.answer_prefix}{' '.join(problem.answers)}"
    room -= counter.cost(asked)
    sizes = [size for size in range(problem.draft.largest + 1) if problem.draft.cost(size) <= room]
    return problem.draft.context(max(sizes, default=0), "") + asked


def _chain_problem(rng: Random, counter: TokenCounter, budget: int, letters: int, lead: str) -> Problem:
    """One chain: the first variable gets a number, each later one the value of the one before."""
    variables = _names(rng, letters, HOPS + 1)
    value = str(rng.randint(10_000, 99_999))
    statements = [f"VAR {variables[0]} = {value}"]
    statements += [f"VAR {variable} = VAR {source}" for source, variable in pairwise(variables)]
    draft: Scattered = scatter(
        counter,
        lead,
        statements,
        noise_lines(),
        budget,
        joiner="\n",
        places=random_places(rng, len(statements)),
        asked=range(len(statements)),
    )
    question, prefix = templates.variable_question(value, len(variables))
    return Problem(draft, question, prefix, tuple(variables))


def _names(rng: Random, letters: int, count: int) -> list[str]:
    """Different names of capital letters, none of which is the keyword."""
    names = distinct(lambda source: random_letters(source, letters, ascii_uppercase), rng, taken=("VAR",))
    return list(islice(names, count))
