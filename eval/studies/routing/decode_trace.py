"""What routing would read in each decoding step of the bundled model, and how much of the attention that takes."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.config import PiKVConfig
from pikv_hf.eval.reference.load import load_reference_model
from pikv_hf.eval.tasks import reference
from pikv_hf.eval.tasks.frame import frame
from pikv_hf.eval.tasks.sample import EvalSample
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.routing.page_router import PageRouter, make_routing
from pikv_hf.routing.policies import AdaptiveRouting
from pikv_hf.routing.policy import Choice, RoutingPolicy
from pikv_hf.routing.routing_view import RoutingView

#: Newest tokens that stay in the window, sink tokens, and shards where there are several. Small, so that what is read
#: in any case leaves room to choose even at 1,024 tokens.
WINDOW, SINKS, SHARDS = 16, 4, 8

#: Where tokens go. Pages of "hash" are those of "sequential", dealt out to shards.
PLACEMENTS: dict[str, dict[str, Any]] = {
    "expert": {"placement": "expert", "num_shards": SHARDS},
    "hash": {"placement": "hash", "num_shards": SHARDS},
    "sequential": {"placement": "hash", "num_shards": 1},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How the pages of a cache are filled: one of PLACEMENTS, and tokens per page."""

    placement: str
    page_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """A way to choose pages: a policy by name, or a control.

    Attributes
    ----------
    name : str
        One of :data:`CONTROLS` or of :data:`pikv_hf.config.ROUTINGS`.
    share : float
        Of all pages, those included that are read in any case: what may be read.
    coverage : float
        Of `"adaptive"`, see :class:`~pikv_hf.PiKVConfig`. With 1 it reads all that it may.
    of_full : bool
        Whether `share` is of the full pages alone, to be read beyond the others.
    """

    name: str
    share: float
    coverage: float = 1.0
    of_full: bool = False

    def policy(self, layer: PiKVLayer) -> RoutingPolicy:
        """Return the policy for a layer with its present number of pages; it chooses one page at least."""
        full, unfilled = (len(part) for part in pages_of(layer))
        most: int | float = 1.0
        if self.share < 1:
            most = max(1, round(self.share * full if self.of_full else self.share * (full + unfilled) - unfilled))
        name = self.name if self.name not in CONTROLS else "page_bound"
        config = PiKVConfig(routing=name, max_pages=most, coverage=self.coverage)
        if self.name in CONTROLS:
            return CONTROLS[self.name](config, layer)
        policy = make_routing(config)
        assert policy is not None
        return policy


class RandomPages(RoutingPolicy):
    """Control: pages at random, others for each KV head and step."""

    def __init__(self, config: PiKVConfig, layer: PiKVLayer) -> None:
        super().__init__(config)
        self._generator = torch.Generator().manual_seed(layer.layer_idx)

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return random numbers."""
        shape = view.index.heads, *view.index.valid.shape
        return torch.rand(shape, generator=self._generator).masked_fill_(~view.index.valid, -torch.inf)


class Oracle(RoutingPolicy):
    """Control: the pages that take most of the attention, all keys known, for each KV head the mean of its queries."""

    def __init__(self, config: PiKVConfig, layer: PiKVLayer) -> None:
        super().__init__(config)
        self._layer = layer

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the masses of pages."""
        return page_attention(self._layer, view.query, view.scale)[0][:, None]


class WithoutFloor(AdaptiveRouting):
    """Control: `adaptive` that stops at its target, however few pages these are."""

    def __init__(self, config: PiKVConfig, layer: PiKVLayer) -> None:
        super().__init__(config)

    def enough(self, view: RoutingView, ranks: torch.Tensor) -> torch.Tensor | None:
        """Return the fewest pages whose shares add up to the target."""
        return self.covering(ranks)


CONTROLS: dict[str, Callable[[PiKVConfig, PiKVLayer], RoutingPolicy]] = {
    "random": RandomPages,
    "oracle": Oracle,
    "adaptive_without_floor": WithoutFloor,
}


def pages_of(layer: PiKVLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the full pages of a layer of one sequence, and those that are always read, numbers in the plain pool."""
    assert layer.table is not None
    (row,) = layer.table.rows
    return torch.from_numpy(row.full_pages()), torch.from_numpy(row.unfilled())


def page_attention(layer: PiKVLayer, query: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what full attention gives to each page.

    Parameters
    ----------
    layer : PiKVLayer
        Of one sequence and without codecs.
    query : torch.Tensor
        `(1, Hq, D)`.
    scale : float
        Of the logits.

    Returns
    -------
    tuple of torch.Tensor
        Shares of the attention of each full page `(H, n)`, in the order of the page index, and of all that is read in
        any case, `(H,)`; means over the query heads of a KV head.
    """
    assert layer.table is not None
    pool, (full, unfilled) = layer.table.plain, pages_of(layer)
    pages = torch.cat([full, unfilled])
    keys = pool.keys[:, pages]
    grouped = query.reshape(len(keys), -1, query.shape[2])
    logits = torch.einsum("hgd,hnpd->hgnp", grouped, keys) * scale
    logits.masked_fill_(pool.positions[pages] < 0, -torch.inf)
    shares = logits.flatten(2).softmax(dim=2).view_as(logits).sum(dim=3).mean(dim=1)
    return shares[:, : len(full)], shares[:, len(full) :].sum(dim=1)


def read_of(layer: PiKVLayer, choice: Choice | None) -> torch.Tensor:
    """Return `(H, n)` bool, the full pages of a layer of one sequence that a step reads."""
    assert layer.table is not None
    shape = layer.table.plain.keys.shape[0], len(pages_of(layer)[0])
    if choice is None:
        return torch.ones(shape, dtype=torch.bool)
    columns = choice.columns[:, 0]
    taken = torch.ones_like(columns, dtype=torch.bool) if choice.taken is None else choice.taken[:, 0]
    return torch.zeros(shape, dtype=torch.bool).scatter_(1, columns, taken)


class Note(NamedTuple):
    """What one step of one layer reads, means over KV heads.

    Attributes
    ----------
    read : float
        The share of all pages.
    covered, covered_full : float
        The share of the attention, and of that to full pages alone.
    """

    read: float
    covered: float
    covered_full: float


class Watcher(RoutingPolicy):
    """Lets every step read everything, and notes what rules would have read in `notes`."""

    def __init__(self, layer: PiKVLayer, rules: Iterable[Rule]) -> None:
        self._layer = layer
        self._policies = {rule: rule.policy(layer) for rule in rules}
        self.notes: dict[Rule, list[Note]] = {rule: [] for rule in self._policies}

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the masses of pages."""
        return page_attention(self._layer, view.query, view.scale)[0][:, None]

    def choose(self, view: RoutingView) -> Choice | None:
        """Note what each rule would read, and read all."""
        masses, always = page_attention(self._layer, view.query, view.scale)
        full, unfilled = (len(part) for part in pages_of(self._layer))
        for rule, policy in self._policies.items():
            read = read_of(self._layer, policy.choose(view))
            chosen = (masses * read).sum(dim=1)
            figures = (read.sum(dim=1) + unfilled) / (full + unfilled), chosen + always, chosen / masses.sum(dim=1)
            self.notes[rule].append(Note(*(figure.mean().item() for figure in figures)))
        return None


class Counter(RoutingPolicy):
    """Chooses as another policy does, and notes the share of all pages read in each step, mean over KV heads."""

    def __init__(self, layer: PiKVLayer, policy: RoutingPolicy) -> None:
        self._layer, self._policy = layer, policy
        self.notes: list[float] = []

    def prepare(self, pools: Any) -> None:
        """Have pools keep what the other policy ranks by."""
        self._policy.prepare(pools)

    def rank(self, view: RoutingView) -> torch.Tensor:
        """Return the other policy's."""
        return self._policy.rank(view)

    def choose(self, view: RoutingView) -> Choice | None:
        """Return the other policy's choice."""
        choice = self._policy.choose(view)
        full, unfilled = (len(part) for part in pages_of(self._layer))
        read = read_of(self._layer, choice).sum(dim=1).float().mean().item()
        self.notes.append((read + unfilled) / (full + unfilled))
        return choice


class Reader:
    """A model, the bundled one by default, that reads contexts and questions as `pikv eval` does into caches."""

    def __init__(self, model: Any = None, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = load_reference_model() if model is None else (model, tokenizer)
        self._before, self._between = frame(self.tokenizer)

    def _ids(self, text: str) -> torch.Tensor:
        ids: torch.Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids

    def _next(self, ids: torch.Tensor, cache: PiKVCache) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, **cache_argument(cache), logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1)

    def read(self, sample: EvalSample, layout: Layout) -> PiKVCache:
        """Return a cache with a context in it."""
        options = PLACEMENTS[layout.placement]
        cache = PiKVCache.for_model(
            self.model, page_size=layout.page_size, recent_window=WINDOW, sink_tokens=SINKS, **options
        )
        self._next(self._ids(self._before + sample.context), cache)
        return cache

    def ask(self, sample: EvalSample, cache: PiKVCache, *, one_by_one: bool = False) -> torch.Tensor:
        """Read the question into a cache and return the first token of the answer, `(1, 1)`.

        A question is read in one call, which looks at everything; `one_by_one` routes each of its tokens too.
        """
        question = self._ids(sample.question + self._between + sample.answer_prefix)
        for ids in question.split(1 if one_by_one else question.shape[1], dim=1):
            token = self._next(ids, cache)
        return token

    def steps(self, sample: EvalSample, cache: PiKVCache, token: torch.Tensor) -> Iterator[int]:
        """Yield the tokens of a greedy answer, `token` being the first."""
        for step in range(sample.max_new_tokens):
            if step:
                token = self._next(token, cache)
            if token.item() == self.tokenizer.eos_token_id:
                return
            yield int(token.item())

    def score(self, sample: EvalSample, cache: PiKVCache, token: torch.Tensor) -> float:
        """Return the score of a greedy answer in percent."""
        text = self.tokenizer.decode(list(self.steps(sample, cache, token)), skip_special_tokens=True)
        return 100 * next(iter(reference.score(sample, text).values()))

    @torch.inference_mode()
    def coverage(self, sample: EvalSample, layout: Layout, rules: Iterable[Rule]) -> dict[Rule, Note]:
        """Return what each rule reads and covers along the exact answer, means over layers and steps."""
        cache = self.read(sample, layout)
        token = self.ask(sample, cache)
        watchers = [Watcher(layer, rules) for layer in cache.layers]
        for layer, watcher in zip(cache.layers, watchers, strict=True):
            layer.parts[0].page_router = PageRouter(watcher, SINKS, WINDOW)
        for _ in self.steps(sample, cache, token):
            pass
        return {rule: _mean([note for watcher in watchers for note in watcher.notes[rule]]) for rule in rules}

    @torch.inference_mode()
    def scores(
        self, sample: EvalSample, layout: Layout, rules: Iterable[Rule], *, one_by_one: bool = False
    ) -> tuple[float, dict[Rule, tuple[float, float]]]:
        """Return the score of the exact answer, and of each rule's score and the share of pages that it reads."""
        cache = self.read(sample, layout)
        asked = cache.fork()
        token = self.ask(sample, asked)
        exact, found = self.score(sample, asked.fork(), token), {}
        for rule in rules:
            twin, counters = routed(cache if one_by_one else asked, rule)
            if one_by_one:
                token = self.ask(sample, twin, one_by_one=True)
            score = self.score(sample, twin, token)
            shares = [share for counter in counters for share in counter.notes]
            # An answer of one token has no step of its own.
            found[rule] = score, statistics.fmean(shares) if shares else math.nan
        return exact, found


def _mean(notes: list[Note]) -> Note:
    return Note(*(statistics.fmean(figures) for figures in zip(*notes, strict=True)))


def routed(cache: PiKVCache, rule: Rule) -> tuple[PiKVCache, list[Counter]]:
    """Return a fork of a cache whose decoding steps read what a rule chooses, and what counts it in each layer."""
    twin, counters = cache.fork(), []
    for layer in twin.layers:
        counters.append(Counter(layer, rule.policy(layer)))
        layer.parts[0].page_router = PageRouter(counters[-1], SINKS, WINDOW)
    return twin, counters
