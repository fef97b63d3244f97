"""Reading, generating and asking under a budget: what the bundled model still finds."""

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.reference.synthetic import tasks, text
from pikv_hf.eval.reference.synthetic.words import FILLERS, KEYS
from pikv_hf.eval.runner.memory_meter import stored_bytes
from pikv_hf.eval.studies.scheduling.decoding_ways import Way
from pikv_hf.eval.tasks import reference
from pikv_hf.eval.tasks.frame import frame
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.scheduling.eviction import row_bytes
from pikv_hf.scheduling.policies.registry import Floats, PageStats, SchedulingPolicy

#: Small pages and window, so that budgets of so short texts leave something to choose.
OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 32, "sink_tokens": 4}
#: Tokens of each prompt and of what is generated after it, and needles in each.
PROMPT, GENERATED, NEEDLES = 256, 640, 4
#: Tokens between two decisions of a press.
EVERY = 16
#: The control: any page goes, each as likely as any other.
RANDOM = "random"


class RandomPages(SchedulingPolicy):
    """Lets pages go at random, others in each layer."""

    name: ClassVar[str] = RANDOM

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)

    def priority(self, view: PageStats) -> Floats:
        """Return random numbers."""
        return self._draw.random(len(view))


def make_cache(model: Any, scheduler: str | None, budget: int | float, **options: Any) -> PiKVCache:
    """Return a cache with a budget, or without one where no scheduler is named; :data:`RANDOM` is one."""
    if scheduler is None:
        return PiKVCache.for_model(model, **options)
    name = "streaming_llm" if scheduler == RANDOM else scheduler
    cache = PiKVCache.for_model(model, budget=budget, scheduler=name, **options)
    if scheduler == RANDOM:
        for layer in cache.layers:
            layer.parts[0].scheduler.policy = RandomPages(layer.layer_idx)
    return cache


class Document(NamedTuple):
    """A prompt and what is generated after it, with needles in both.

    Attributes
    ----------
    prompt, generated : torch.Tensor
        `(PROMPT,)` and `(GENERATED,)` int64.
    needles : list of tuple
        Key and number, those of the prompt first.
    """

    prompt: torch.Tensor
    generated: torch.Tensor
    needles: list[tuple[str, str]]


class Finding(NamedTuple):
    """Shares of the questions about one document that were answered exactly: needles of the prompt, generated ones."""

    in_prompt: float
    generated: float


class Generator:
    """The bundled model, reading prompts, "generating" given text token by token, and answering questions."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.tokenizer = load_reference_model(dtype)

    def _ids(self, words: str) -> torch.Tensor:
        ids: torch.Tensor = self.tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return ids

    def documents(self, count: int, seed: int) -> list[Document]:
        """Return documents of equal lengths."""
        return [self._document(random.Random(f"budget {seed} {number}")) for number in range(count)]

    def _document(self, rng: random.Random) -> Document:
        pairs = tasks.random_pairs(rng, KEYS, 2 * NEEDLES)
        before, _ = frame(self.tokenizer)
        head = f"{before}{text.PREAMBLE_MANY}\n"
        prompt = self._fill(rng, head, pairs[:NEEDLES], PROMPT)
        return Document(prompt, self._fill(rng, "", pairs[NEEDLES:], GENERATED), pairs)

    def _fill(self, rng: random.Random, head: str, pairs: Sequence[tuple[str, str]], tokens: int) -> torch.Tensor:
        """Return exactly so many tokens: needles at random places of filler, after `head`."""
        needles = [text.needle(*pair) for pair in pairs]
        room = tokens - len(self._ids(" ".join([head, *needles])))
        filler = []
        for sentence in text.essay_sentences(rng):
            if (room := room - text.count_tokens(sentence)) < 0:
                break
            filler.append(sentence)
        places = sorted(rng.choices(range(len(filler) + 1), k=len(needles)))
        for place, needle in reversed(list(zip(places, needles, strict=True))):
            filler.insert(place, needle)
        # What is missing to the length are words of a sentence that is cut off.
        rest = self._ids(" ".join(rng.choices(FILLERS, k=16)))
        return torch.cat([self._ids(head + " ".join(filler)), rest])[:tokens]

    @torch.inference_mode()
    def find(
        self, documents: Sequence[Document], scheduler: str | None, budget: int, options: dict[str, Any]
    ) -> tuple[list[Finding], float]:
        """Read prompts in one call, generate token by token, then ask for each needle on a fork.

        Parameters
        ----------
        documents : sequence of Document
            Rows of one batch.
        scheduler : str, optional
            Or :data:`RANDOM`; None for no budget.
        budget : int
            Tokens of each row and layer.
        options : dict
            Of the cache.

        Returns
        -------
        list of Finding, float
            By document, and the most tokens that a row held in a layer after any step, mean over KV heads.
        """
        cache = make_cache(self.model, scheduler, budget, **OPTIONS, **options)
        most = self._read(documents, cache, most_held)
        return self._asked(documents, cache), most

    @torch.inference_mode()
    def find_by_press(self, documents: Sequence[Document], way: Way, budget: int) -> tuple[list[Finding], float]:
        """Do the same with a press that is active while prompts are read and text is generated, not while it is asked.

        What is held is measured in bytes, as those of so many tokens, mean over rows and layers.
        """
        cache = way.cache(self.model, budget)
        with way.press(budget, EVERY)(self.model):
            most = self._read(documents, cache, partial(self._bytes_held, len(documents)))
        return self._asked(documents, cache), most

    def _bytes_held(self, rows: int, cache: Any) -> float:
        config = self.model.config
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return stored_bytes(cache) / (rows * numbers * self.model.dtype.itemsize)

    def _read(self, documents: Sequence[Document], cache: Any, held: Callable[[Any], float]) -> float:
        """Read prompts in one call and generate; return the most that was held after any call."""
        generated, past, most = torch.stack([document.generated for document in documents]), 0, 0.0
        for ids in (torch.stack([document.prompt for document in documents]), *generated.split(1, dim=1)):
            self._next(ids, cache, past)
            past += ids.shape[1]
            most = max(most, held(cache))
        return most

    def _asked(self, documents: Sequence[Document], cache: Any) -> list[Finding]:
        past = len(documents[0].prompt) + len(documents[0].generated)
        right = [
            self._ask([document.needles[number] for document in documents], cache, past)
            for number in range(2 * NEEDLES)
        ]
        by_document = torch.tensor(right, dtype=torch.float64).T
        shares = zip(by_document[:, :NEEDLES].mean(1).tolist(), by_document[:, NEEDLES:].mean(1).tolist(), strict=True)
        return [Finding(*pair) for pair in shares]

    def _next(self, ids: torch.Tensor, cache: Any, past: int) -> torch.Tensor:
        """Return the token that follows; `past` were read before, whatever is left of them."""
        positions = torch.arange(past, past + ids.shape[1])[None].expand(len(ids), -1)
        logits: torch.Tensor = self.model(ids, position_ids=positions, **cache_argument(cache), logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def _ask(self, needles: Sequence[tuple[str, str]], cache: Any, past: int) -> list[bool]:
        """Return for each row whether the number of its key is answered exactly."""
        fork = copy.deepcopy(cache)
        question = torch.stack([self._ids("\n" + "\n".join(text.ask_one(key))) for key, _ in needles])
        expected = torch.stack([self._ids(f"{number}.") for _, number in needles])
        answer = [self._next(question, fork, past)]
        while len(answer) < expected.shape[1]:
            answer.append(self._next(answer[-1], fork, past + question.shape[1] + len(answer) - 1))
        return torch.cat(answer, dim=1).eq(expected).all(dim=1).tolist()

    @torch.inference_mode()
    def ruler(self, sample: EvalSample, scheduler: str | None, budget: float, chunk: int) -> float:
        """Return the score of a greedy answer in percent; the context is read in chunks, the question in one call."""
        before, between = frame(self.tokenizer)
        cache = make_cache(self.model, scheduler, budget, **OPTIONS)
        question = self._ids(sample.question + between + sample.answer_prefix)
        past = 0
        for ids in (*self._ids(before + sample.context).split(chunk), question):
            token = self._next(ids[None], cache, past)
            past += len(ids)
        answer: list[int] = []
        while len(answer) < sample.max_new_tokens and int(token) != self.tokenizer.eos_token_id:
            answer.append(int(token))
            token = self._next(token, cache, past + len(answer) - 1)
        words = self.tokenizer.decode(answer, skip_special_tokens=True)
        return 100 * next(iter(reference.score(sample, words).values()))


def most_held(cache: PiKVCache) -> float:
    """Return the most tokens that a sequence holds in a layer after a call, mean over KV heads.

    Where layers decide together it is the mean over layers, and a packed token counts as what it takes of one that is
    not.
    """
    held = np.array([tokens_held(layer) for layer in cache.layers])
    return float((held.mean(axis=0) if cache.layers[0].decides_jointly else held).max())


def tokens_held(layer: PiKVLayer) -> list[float]:
    """Return the tokens that each sequence holds in a layer after a call, means over KV heads."""
    layer.edits.settle_unless_awaited()
    assert layer.table is not None
    lanes, plain = layer.store.lanes, layer.table.plain
    if layer.decides_jointly:
        of_token = plain.page_bytes / plain.page_size * lanes
        return [float(nbytes / of_token) for nbytes in row_bytes(layer.table, lanes)]
    return [float(tokens) for tokens in np.reshape(layer.table.tokens(), (-1, lanes)).mean(axis=1)]


def ruler_samples(length: int, samples: int, seed: int) -> list[EvalSample]:
    """Return samples of all tasks that the bundled model knows, task by task in turn."""
    found = reference.generate(length, samples, seed=seed)
    by_task = [found[first : first + samples] for first in range(0, len(found), samples)]
    return list(itertools.chain.from_iterable(zip(*by_task, strict=True)))
