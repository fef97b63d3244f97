"""RULER's wording: what stands before the haystack, the question, and the beginning of the answer.

These sentences are the interface of the tasks (Hsieh et al., 2024, arXiv 2404.06654, task templates): models are asked
in them everywhere, so they are kept to the letter, slips included. The split into context, question and answer prefix
is kvpress's. Sentences that this package's synthetic documents share with RULER come from there.
"""

from collections.abc import Sequence

from pikv_hf.eval.reference.synthetic import text

TASKS: tuple[str, ...] = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)

#: Answer limits of the five families of tasks, in tokens.
MAX_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}

NOISE_LINE = " ".join(text.NOISE_SENTENCES)

VT_LEAD = f"{text.PREAMBLE_VARIABLES}\n\n"

CWE_LEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
CWE_PREFIX = "Answer: The top 10 words that appear most often in the list are:"

FWE_LEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = "Answer: According to the coded text above, the three most frequently appeared words are:"

_QA_ORDER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
QA_LEAD = f"{_QA_ORDER}\n\nThe following are given documents.\n\n"
QA_PREFIX = "Answer:"


def family(task: str) -> str:
    """Key of `task` in `MAX_NEW_TOKENS`."""
    return task.partition("_")[0]


def needle(key: str, value: str, kind: str) -> str:
    """The sentence that hides `value`, a `"number"` or `"uuid"`, under `key`."""
    return _of_kind(text.needle(key, value), kind)


def needle_lead(kind: str, *, one: bool) -> str:
    """What stands before a haystack in which one value, or several, will be asked for."""
    return _of_kind(text.PREAMBLE_ONE if one else text.PREAMBLE_MANY, kind) + "\n"


def needle_question(keys: Sequence[str], kind: str, *, one: bool) -> tuple[str, str]:
    """Question and answer prefix for one value, or for all values of all `keys`."""
    question, prefix = text.ask_one(keys[0]) if one else text.ask_all(keys)
    return _of_kind(question, kind), _of_kind(prefix, kind)


def variable_question(value: str, count: int) -> tuple[str, str]:
    """Question and answer prefix for the `count` variables that have `value`."""
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        # "assgined" is how RULER spells it, and how every model that reports a score was asked.
        f"Answer: According to the chain(s) of variable assignment in the text above, "
        f"{count} variables are assgined the value {value}, they are: ",
    )


def document_question(question: str) -> str:
    """Question about documents, after the instruction is repeated."""
    return f"{_QA_ORDER}\n\nQuestion: {question}"


def _of_kind(sentence: str, kind: str) -> str:
    """`sentence` about numbers, said of another kind of value. Keys hold no spaces, so none can match."""
    return sentence.replace("magic number", f"magic {kind}").replace("about the number", f"about the {kind}")
