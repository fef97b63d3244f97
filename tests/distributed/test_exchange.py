"""What processes send each other: merged results, and what shows that they are still at the same thing."""

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from press_runs import ids_of, shared_model

from pikv_hf import PiKVCache
from pikv_hf.distributed.lockstep import AGREEMENT, HEADER, difference, fingerprint, header_of, prompt_mark
from pikv_hf.distributed.process_exchange import Exchange, ProcessError
from pikv_hf.kernels import partial_attention

HEADS, DIM, VALUE_DIM = 4, 16, 8


class Threads:
    """Stands for torch.distributed among threads; a message of another size is an error, as gloo makes it one."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.sent = ranks, [0] * ranks
        self._calls: dict[int, dict[int, torch.Tensor]] = {}
        self._gone = False
        self._changed = threading.Condition()
        self._rank = threading.local()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace the functions that an exchange calls."""
        monkeypatch.setattr(dist, "get_rank", lambda group: self._rank.number)
        monkeypatch.setattr(dist, "get_world_size", lambda group: self.ranks)
        monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
        monkeypatch.setattr(dist, "all_gather", self._all_gather)
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)

    def run(self, work: Callable[[Exchange], Any]) -> list[Any]:
        """Return what each rank returns, or raises."""
        results: list[Any] = [None] * self.ranks

        def one(rank: int) -> None:
            self._rank.number = rank
            try:
                results[rank] = work(Exchange(self, 5.0))
            except Exception as error:
                results[rank] = error
                with self._changed:
                    self._gone = True
                    self._changed.notify_all()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def _swapped(self, mine: torch.Tensor) -> list[torch.Tensor]:
        rank = self._rank.number
        with self._changed:
            call = self._calls.setdefault(self.sent[rank], {})
            call[rank] = mine.clone()
            self.sent[rank] += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._gone or len(call) == self.ranks, timeout=5)
        if len(call) < self.ranks:
            raise RuntimeError("Connection closed by peer")
        found = [call[rank] for rank in range(self.ranks)]
        if len({each.shape for each in found}) > 1:
            raise AssertionError("gloo would have ended the process")
        return found

    def _all_gather(self, parts: list[torch.Tensor], mine: torch.Tensor, group: Any) -> None:
        for part, other in zip(parts, self._swapped(mine), strict=True):
            part.copy_(other)

    def _all_reduce(self, tensor: torch.Tensor, group: Any) -> None:
        tensor.copy_(torch.stack(self._swapped(tensor)).sum(dim=0))


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Threads]:
    """Return a function that makes ranks of threads."""

    def make(ranks: int) -> Threads:
        world = Threads(ranks)
        world.install(monkeypatch)
        return world

    return make


def nothing_for(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what a rank without pages has to say."""
    return torch.zeros((*query.shape[:3], VALUE_DIM)), torch.full(query.shape[:3], -torch.inf)


def merged(
    exchange: Exchange,
    query: torch.Tensor,
    part: Any = None,
    seen: int = 7,
    layer: int = 2,
    prompt: torch.Tensor | None = None,
    leads: bool = True,
) -> Any:
    """Agree and merge, as attention does."""
    exchange.agree(layer, seen, query, VALUE_DIM, prompt, leads)
    with exchange.joined(layer, query):
        found = part() if callable(part) else part or nothing_for(query)
    return exchange.merge(layer, seen, query, *found, leads)


# Results


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("queries", [1, 3])
def test_parts_merge_to_attention_over_everything(threads: Any, ranks: int, queries: int) -> None:
    """Whatever part of the tokens each rank has, none at all among them, and in each of them bit by bit the same."""
    query, keys = torch.randn(2, HEADS, queries, DIM), torch.randn(2, HEADS, 40, DIM)
    values, owner = torch.randn(2, HEADS, 40, VALUE_DIM), torch.randint(0, max(1, ranks - 1), (40,))

    def work(exchange: Exchange) -> Any:
        mine = (owner == exchange.rank).nonzero().squeeze(1)
        if not len(mine):
            return merged(exchange, query)
        some = keys[:, :, mine].flatten(0, 1), values[:, :, mine].flatten(0, 1)
        out, lse = partial_attention(query.flatten(0, 1), *some, 0.25)
        return merged(exchange, query, (out.view(*query.shape[:3], -1), lse.view(query.shape[:3])))

    results = threads(ranks).run(work)
    logits = query.double() @ keys.double().mT * 0.25
    for out, lse in results:
        torch.testing.assert_close(out.double(), logits.softmax(dim=-1) @ values.double(), atol=2e-6, rtol=0)
        torch.testing.assert_close(lse.double(), logits.logsumexp(dim=-1), atol=2e-6, rtol=0)
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_nothing_anywhere_is_nothing(threads: Any) -> None:
    for out, lse in threads(3).run(lambda exchange: merged(exchange, torch.randn(1, HEADS, 1, DIM).fill_(1))):
        assert not out.any()
        assert torch.equal(lse, torch.full((1, HEADS, 1), -torch.inf))


def test_a_step_sends_one_message_of_its_result(threads: Any) -> None:
    """Once sizes are agreed on: after the first step, and again where rows change or a prompt was read."""
    world = threads(2)
    one, many = torch.randn(1, HEADS, 1, DIM), torch.randn(3, HEADS, 2, DIM)

    def work(exchange: Exchange) -> list[tuple[int, int]]:
        seen = []
        for query, prompt in ((one, None), (one, None), (many, None), (many, None), (many, prompt_mark(many))):
            before = world.sent[exchange.rank], exchange.bytes_sent
            merged(exchange, query, prompt=prompt)
            seen.append((world.sent[exchange.rank] - before[0], exchange.bytes_sent - before[1]))
        assert exchange.collectives == 5
        return seen

    small, large = (4 * (HEADER + rows * HEADS * (1 + VALUE_DIM)) for rows in (1, 6))
    expected = [(2, small + 4 * AGREEMENT), (1, small), (2, large + small), (1, large), (2, 2 * large)]
    assert world.run(work) == [expected, expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_totals_are_exact(threads: Any, dtype: torch.dtype) -> None:
    """Each number is in one rank; those of others are zero there."""
    whole = torch.randn(4, 9).double() > 0 if dtype == torch.bool else torch.randn(4, 9).double().to(dtype) / 3
    owner = torch.randint(0, 3, (4, 9))
    for total in threads(3).run(lambda exchange: exchange.total(whole * (owner == exchange.rank))):
        assert total.dtype == dtype
        assert torch.equal(total, whole)


def test_totals_of_nothing_send_nothing(threads: Any) -> None:
    world = threads(2)
    assert [len(each) for each in world.run(lambda exchange: exchange.total(torch.zeros(0)))] == [0, 0]
    assert world.sent == [0, 0]
    assert world.run(lambda exchange: exchange.sum(2**40 + exchange.rank)) == [2**41 + 1] * 2


# What is not the same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 3}, "layer 2 here and 3 there"),
        ({"seen": 8}, "positions seen 7 here and 8 there"),
        ({"query": (2, HEADS, 1, DIM)}, "rows 1 here and 2 there"),
        ({"query": (1, HEADS, 4, DIM)}, "queries 1 here and 4 there"),
        ({"query": (1, HEADS + 1, 1, DIM)}, "query heads 4 here and 5 there|only one of them has new rows"),
        ({"query": (1, HEADS, 1, DIM)}, "attend with different queries"),
        ({"prompt": (1, HEADS, 9, DIM)}, "read"),
    ],
    ids=str,
)
@pytest.mark.parametrize("when", ["first", "later"])
def test_ranks_that_differ_are_told_so(threads: Any, changes: dict[str, Any], message: str, when: str) -> None:
    """All of them, and by messages of one size."""
    query = torch.randn(1, HEADS, 1, DIM, generator=torch.Generator().manual_seed(1))

    def work(exchange: Exchange) -> Any:
        if when == "later":
            merged(exchange, query)
        other = dict(changes) if exchange.rank == 2 else {}
        if "prompt" in other:
            other["prompt"] = prompt_mark(torch.ones(other["prompt"]))
        mine = (
            torch.randn(other.pop("query"), generator=torch.Generator().manual_seed(2)) if "query" in other else query
        )
        return merged(exchange, mine, **other)

    results = threads(3).run(work)
    assert all(isinstance(each, ProcessError) for each in results), results
    assert re.search(message, str(results[0]))
    assert "ranks 0 and 2" in str(results[0])


def test_prompts_that_differ_in_a_token_are_noticed(threads: Any) -> None:
    keys = torch.randn(1, 2, 4000, DIM)

    def work(exchange: Exchange, changed: bool) -> Any:
        mine = keys.clone()
        if changed and exchange.rank:
            mine[:, :, 1234] = torch.randn(2, DIM, generator=torch.Generator().manual_seed(5))
        return merged(exchange, torch.ones(1, HEADS, 1, DIM), prompt=prompt_mark(mine))

    assert all(isinstance(each, tuple) for each in threads(2).run(lambda exchange: work(exchange, False)))
    for error in threads(2).run(lambda exchange: work(exchange, True)):
        assert isinstance(error, ProcessError)
        assert "have read different prompts" in str(error)


def said(first: torch.Tensor, second: torch.Tensor) -> str:
    """Return in which way two ranks' queries differ too much."""
    headers = [header_of(0, 5, query).tolist() for query in (first, second)]
    return difference(*headers, first.dtype)


@pytest.mark.parametrize("shape", [(1, HEADS, 1, DIM), (1, 32, 1, 128), (64, HEADS, 1, DIM), (2, HEADS, 700, DIM)])
def test_rounding_is_no_difference(shape: tuple[int, ...]) -> None:
    """Of bfloat16, on other hardware."""
    for seed in range(20):
        query = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))
        other = query * (1 + 0.004 * noise)
        assert not said(query.bfloat16(), other.bfloat16())


@pytest.mark.parametrize("kind", ["zeros", "nan", "inf", "huge", "tiny", "some nan"])
def test_odd_numbers_are_no_difference(kind: str) -> None:
    query = torch.randn(3, HEADS, 2, DIM)
    if kind == "some nan":
        query[1] = torch.nan
        assert said(query, torch.randn(3, HEADS, 2, DIM))
    else:
        numbers = {"zeros": 0.0, "nan": torch.nan, "inf": torch.inf, "huge": 1e30, "tiny": 1e-30}
        query = query * 0 + numbers[kind] if kind in ("zeros", "nan", "inf") else query * numbers[kind]
    assert torch.isfinite(fingerprint(query)).all()
    assert not said(query, query.clone())


@pytest.mark.parametrize("rows", [1, 8, 256])
def test_another_row_is_noticed(rows: int) -> None:
    """One among many, and two that have changed places; in the first layer, in any single step."""
    missed = 0
    for seed in range(200):
        query = torch.randn((rows, HEADS, 1, DIM), generator=torch.Generator().manual_seed(seed))
        other = query.clone()
        other[seed % rows] = torch.randn((HEADS, 1, DIM), generator=torch.Generator().manual_seed(1000 + seed))
        missed += not said(query, other)
        if rows > 1:
            assert said(query, query.roll(1, dims=0))
    assert missed <= 4


def test_long_calls_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(3, HEADS, 50, DIM)
    whole = fingerprint(vectors)
    monkeypatch.setattr("pikv_hf.distributed.lockstep._PIECE", 21)
    torch.testing.assert_close(fingerprint(vectors), whole, atol=1e-4, rtol=0)


# Ranks that fail


def test_a_rank_that_fails_while_it_attends_says_so(threads: Any) -> None:
    """The others are told which one; it keeps its own error."""
    query = torch.randn(1, HEADS, 1, DIM)

    def failing() -> Any:
        raise MemoryError("too much")

    results = threads(3).run(lambda exchange: merged(exchange, query, failing if exchange.rank == 1 else None))
    assert isinstance(results[1], MemoryError)
    for rank in (0, 2):
        assert isinstance(results[rank], ProcessError)
        assert f"rank {rank}: rank 1 failed at layer 2" in str(results[rank])


@pytest.mark.parametrize("fails", [False, True])
def test_gpus_look_before_the_next_merge(threads: Any, fails: bool) -> None:
    """Looking at what others say waits for it: until then the next layer can be launched."""
    queries = torch.randn(2, 1, HEADS, 1, DIM, generator=torch.Generator().manual_seed(3))

    def work(exchange: Exchange) -> list[Any]:
        exchange._defers = True
        merged(exchange, queries[0])
        odd = exchange.rank == 1

        def failing() -> Any:
            raise MemoryError("too much")

        results = [merged(exchange, queries[0] if fails or not odd else queries[1], failing if fails and odd else None)]
        with pytest.raises(
            ProcessError, match="rank 1 failed at layer 2" if fails else "attend with different queries"
        ):
            merged(exchange, queries[0])
        return results

    results = threads(2).run(work)
    assert isinstance(results[0], list), results
    assert isinstance(results[1], MemoryError if fails else list)


def test_only_the_first_layer_compares_queries(threads: Any) -> None:
    def work(exchange: Exchange) -> Any:
        return merged(exchange, torch.full((1, HEADS, 1, DIM), 1.0 - 2 * exchange.rank), leads=False)

    assert all(isinstance(each, tuple) for each in threads(2).run(work))


def test_nobody_waits_for_a_rank_that_has_left(threads: Any) -> None:
    query = torch.randn(1, HEADS, 1, DIM)

    def work(exchange: Exchange) -> Any:
        merged(exchange, query)
        if exchange.rank == 1:
            with pytest.raises(MemoryError), exchange.leaving():
                raise MemoryError("too much")
        return merged(exchange, query)

    first, second = threads(2).run(work)
    assert "rank 1 of 2 is alone since rank 1 raised MemoryError: too much" in str(second)
    assert "rank 0 of 2 got no answer from all others at layer 2: one of them has died" in str(first)
    assert "longer than 5 s" in str(first)


@pytest.mark.parametrize("error", [ValueError("wrong"), TypeError("wrong"), ProcessError("wrong")])
def test_what_all_ranks_raise_leaves_nobody(threads: Any, error: Exception) -> None:
    query = torch.randn(1, HEADS, 1, DIM)

    def work(exchange: Exchange) -> Any:
        with pytest.raises(type(error)), exchange.leaving():
            raise error
        return merged(exchange, query)

    assert all(isinstance(each, tuple) for each in threads(2).run(work))


# What a user can get wrong


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"process_group": "world"}, RuntimeError, "start them with torchrun or accelerate launch"),
        ({"process_group": "node"}, ValueError, "must be \"world\", got 'node'"),
        ({"process_group": 2}, ValueError, 'must be "world", got 2'),
        ({"process_group": "world", "devices": ["cpu"]}, ValueError, "either devices or process_group.*'cpu'.*'world'"),
        ({"process_group": "world", "timeout": 0}, ValueError, "positive number of seconds, got 0"),
        ({"process_group": "world", "timeout": -1.0}, ValueError, "positive number of seconds, got -1.0"),
        ({"process_group": "world", "timeout": True}, ValueError, "positive number of seconds, got True"),
        ({"process_group": "world", "timeout": "10 s"}, ValueError, "positive number of seconds, got '10 s'"),
        ({"process_group": "world", "timeout": float("nan")}, ValueError, "positive number of seconds, got nan"),
        ({"process_group": "world", "timeout": float("inf")}, ValueError, "positive number of seconds, got inf"),
        ({"process_group": "world", "max_memory": {"cpu": "1GiB"}}, ValueError, "max_memory"),
    ],
    ids=str,
)
def test_what_a_group_cannot_be(
    options: dict[str, Any], kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(kind, match=message):
        PiKVCache.for_model(shared_model(), **options)


def test_one_process_exchanges_nothing() -> None:
    cache = PiKVCache.for_model(shared_model())
    with torch.no_grad():
        shared_model()(ids_of(20), past_key_values=cache)
    assert all(layer.layout.exchange is None and layer.prompt_mark is None for layer in cache.layers)
    assert cache.total_nbytes == cache.nbytes
