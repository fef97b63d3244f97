"""Count the tokens of a prompt, and guess how many one more piece of text adds to it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from transformers import PreTrainedTokenizerBase

from pikv_hf.eval.tasks.frame import frame

# What stands before a piece when its cost is measured: it keeps rules for the beginning of a text out of the figure.
_ANCHOR = "."
# Pieces counted at once while gathering, and pieces remembered at most: needles never come back, sentences do.
_BLOCK, _REMEMBERED = 32, 200_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """The parts that kvpress's pipeline puts together."""

    context: str
    question: str
    answer_prefix: str


@dataclass(frozen=True, slots=True)
class Pieces:
    """Pieces of text and their running cost.

    Attributes
    ----------
    texts : tuple of str
        Pieces in order.
    reach : tuple of int
        Estimated tokens of the first 0, 1, 2, ... pieces, separators included.
    """

    texts: tuple[str, ...]
    reach: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


class TokenCounter:
    """Counts tokens as kvpress's pipeline makes them.

    The pipeline encodes the context, with the beginning-of-sequence token or the chat template's first part before it,
    and the question, with a newline or the template's second part and the answer prefix after it, each on its own and
    without special tokens of the tokenizer's own.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Any tokenizer. A fast one encodes a batch on all cores unless `TOKENIZERS_PARALLELISM` is `false`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before, self._between = frame(tokenizer)
        self._costs: dict[str, int] = {}
        self._anchor = self.lengths([_ANCHOR])[0]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, really encoded, without special tokens."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            # Of the same ids, only their number is wanted: lists of Python integers would cost more than the encoding.
            return [len(encoding) for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        encoded = self._tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def context_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each context, with what the pipeline puts before it."""
        return self.lengths([self._before + prompt.context for prompt in prompts])

    def question_lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each question and answer prefix, with what the pipeline puts between them."""
        return self.lengths([f"{prompt.question}{self._between}{prompt.answer_prefix}" for prompt in prompts])

    def costs(self, pieces: Sequence[str], separator: str = " ") -> list[int]:
        """Tokens that each piece adds after a sentence and `separator`; measured once and remembered."""
        keys = [_ANCHOR + separator + piece for piece in pieces]
        if new := [key for key in dict.fromkeys(keys) if key not in self._costs]:
            if len(self._costs) > _REMEMBERED:
                self._costs.clear()
                new = list(dict.fromkeys(keys))
            self._costs.update(zip(new, self.lengths(new), strict=True))
        return [self._costs[key] - self._anchor for key in keys]

    def cost(self, piece: str, separator: str = " ") -> int:
        """Tokens that one piece adds."""
        return self.costs([piece], separator)[0]

    def gather(self, pieces: Iterable[str], budget: int, separator: str = " ") -> Pieces:
        """The first pieces that are together more than `budget` tokens, or all there are."""
        texts: list[str] = []
        costs: list[int] = []
        source, total = iter(pieces), 0
        while total <= budget and (block := list(islice(source, _BLOCK))):
            texts += block
            costs += self.costs(block, separator)
            total = sum(costs) if total == 0 else total + sum(costs[-len(block) :])
        return Pieces(tuple(texts), tuple(accumulate(costs, initial=0)))

    def take(self, pieces: Sequence[str], room: int, separator: str) -> tuple[str, int]:
        """As many of `pieces`, joined by spaces after a `separator`, as fit into `room` tokens, and their tokens."""
        costs = [*self.costs(pieces[:1], separator), *self.costs(pieces[1:])]
        taken = _fitting(accumulate(costs), room)
        return " ".join(pieces[: len(taken)]), taken[-1] if taken else 0


def _fitting(reach: Iterator[int], room: int) -> list[int]:
    """The running costs that are at most `room`."""
    fitting = []
    for cost in reach:
        if cost > room:
            break
        fitting.append(cost)
    return fitting
