"""SCBench's tasks that are scored here: how each is asked, how long an answer may be, and what it is compared by."""

import re
from dataclasses import dataclass

from pikv_hf.common.suggest import did_you_mean
from pikv_hf.eval.metrics.registry import make_metric
from pikv_hf.eval.tasks.scbench.records import Turn


@dataclass(frozen=True, slots=True)
class Task:
    """A task of SCBench.

    Attributes
    ----------
    before : str
        What comes before the context.
    ask : str
        What the first question, and every one after it, is put into; `{input}` stands for it.
    max_new_tokens : int
        Limit of an answer.
    metric : str
        One of :data:`pikv_hf.eval.metrics.registry.METRICS`, or `choice`: the first letter that is an option's.
    """

    before: str
    ask: str
    max_new_tokens: int
    metric: str


#: Of the public ones; those about code are compared by parsing it, which is not done here.
TASKS: dict[str, Task] = {
    "scbench_kv": Task("Find a value in this JSON object.\n\n", "\n\n{input}\nThe value is:", 64, "string_match_part"),
    "scbench_prefix_suffix": Task(
        "Find a string in this list.\n\n", "\n\n{input}\nThe string is:", 128, "string_match_part"
    ),
    "scbench_vt": Task("Follow how variables are set.\n\n", "\n\n{input}\nThe variables are:", 96, "string_match_all"),
    "scbench_mf": Task("Look at this list of numbers.\n\n", "\n\n{input}\nThe number is:", 16, "string_match_part"),
    "scbench_qa_eng": Task("Read this and answer briefly.\n\n", "\n\nQuestion: {input}\nAnswer:", 40, "qa_f1"),
    "scbench_qa_chn": Task("请阅读并简短回答。\n\n", "\n\n问题:{input}\n回答:", 40, "qa_f1_zh"),
    "scbench_choice_eng": Task(
        "Read this and choose.\n\n", "\n\nQuestion: {input}\nThe letter of the answer is:", 8, "choice"
    ),
    "scbench_many_shot": Task("Answer as these examples do.\n\n", "\n\n{input}\n", 8, "choice"),
    "scbench_summary": Task("Read these texts.\n\n", "\n\n{input}\nSummary:", 200, "rouge_l"),
}
_LETTER = re.compile(r"\(?\b([A-Z])\b\)?")


def task_named(name: str) -> Task:
    """Return a task; raise `ValueError` for one that is not known, with a suggestion."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{did_you_mean(name, TASKS)}; known: {', '.join(TASKS)}")
    return TASKS[name]


def question(task: Task, turn: Turn) -> str:
    """Return how a turn is asked, with its options by letters."""
    options = "".join(f"\n{chr(ord('A') + number)}. {option}" for number, option in enumerate(turn.options))
    return task.ask.replace("{input}", turn.input + options)


def score(task: Task, turn: Turn, answer: str) -> float:
    """Return how right an answer is, in [0, 1]."""
    if task.metric != "choice":
        return make_metric(task.metric).score(answer, turn.answers)
    found = _LETTER.search(answer)
    letters = {_letter(turn, right) for right in turn.answers}
    return float(found is not None and found[1] in letters)


def _letter(turn: Turn, answer: str) -> str:
    """Return the letter of an answer that is an option, or that begins with one."""
    if answer in turn.options:
        return chr(ord("A") + turn.options.index(answer))
    found = _LETTER.search(answer)
    return answer if found is None else found[1]
