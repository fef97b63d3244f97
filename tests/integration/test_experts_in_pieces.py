"""Feed-forward blocks that run for some of the tokens at a time: experts are joined where their order is known."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.integration import layer_calls

Run = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]
SMALL: dict[str, Any] = {"page_size": 4, "recent_window": 4, "num_shards": 3}


@pytest.fixture(autouse=True)
def _not_said_yet() -> Iterator[None]:
    layer_calls._warn_by_position.cache_clear()
    yield
    layer_calls._warn_by_position.cache_clear()


def whole(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    return block(hidden)


def by_tokens(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([block(part.contiguous()) for part in hidden.split(3, 1)], 1)


def by_rows(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([block(part) for part in hidden.split(1)])


def without_first(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """As if the first token of each row were padding."""
    return torch.cat([torch.zeros_like(hidden[:, :1]), block(hidden[:, 1:].contiguous())], 1)


def with_more(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    """As if tokens were filled up to a multiple of something."""
    return block(torch.cat([hidden, hidden[:, :1]], 1))[:, :-1]


def blocks_run(model: Any, run: Run) -> Any:
    for layer in model.model.layers:
        block = getattr(layer, "mlp", None) or layer.block_sparse_moe
        block.forward = lambda hidden, forward=block.forward: run(forward, hidden)
    return model


def ids(rows: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 198, (rows, count), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def results(cache: Any, model: Any, rows: int) -> list[torch.Tensor]:
    calls = (ids(rows, 17), ids(rows, 1, 1), ids(rows, 7, 2), *ids(rows, 6, 3).split(1, 1))
    return [model(given, past_key_values=cache).logits for given in calls]


def experts_of(cache: PiKVCache) -> list[dict[tuple[int, int], int]]:
    """Return for each layer the expert that is noted for each token, by row and position; -1 if it is not known."""
    noted: list[dict[tuple[int, int], int]] = []
    for layer in cache.layers:
        layer.settle()
        pool, rows = layer.table.plain, layer.table.rows
        places = [(row, page, slot) for row, pages in enumerate(rows) for page in pages.pages() for slot in range(4)]
        filled = [(row, page, slot) for row, page, slot in places if slot < pool.count[page]]
        noted.append(
            {(row, int(pool.positions[page, slot])): int(pool.experts[page, slot]) for row, page, slot in filled}
        )
    return noted


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("run", [by_tokens, by_rows, without_first, with_more])
def test_as_dynamic_cache(run: Run, rows: int, name: str) -> None:
    model = blocks_run(FAMILIES[name].build(), run)
    expected = results(DynamicCache(config=model.config), model, rows)
    cache = PiKVCache.for_model(model, **SMALL)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = results(cache, model, rows)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
    assert all(layer.pending is None for layer in cache.layers)
    known = (rows == 1 and run in (by_tokens, by_rows)) or (run is by_rows)
    assert sum("placed by position" in str(each.message) for each in said) == (0 if known else 1)


@pytest.mark.parametrize(("run", "rows"), [(by_tokens, 1), (by_rows, 3)])
def test_pieces_place_tokens_as_the_whole_does(run: Run, rows: int) -> None:
    caches = {}
    for how in (whole, run):
        model = blocks_run(FAMILIES["mixtral"].build(), how)
        caches[how] = PiKVCache.for_model(model, **SMALL)
        results(caches[how], model, rows)
    placed = experts_of(caches[whole])
    assert experts_of(caches[run]) == placed
    assert {len(layer) for layer in placed} == {31 * rows}
    assert all(min(layer.values()) >= 0 and len({*layer.values()}) > 4 for layer in placed)


def test_tokens_whose_order_is_not_known_have_no_expert() -> None:
    model = blocks_run(FAMILIES["mixtral"].build(), by_tokens)
    cache = PiKVCache.for_model(model, **SMALL)
    results(cache, model, 3)
    for layer in experts_of(cache):
        # Those that came alone are known: all of one call are the newest of their rows.
        known = {position for (_, position), expert in layer.items() if expert >= 0}
        assert known == {17, *range(25, 31)}


@torch.no_grad()
def test_a_block_that_fails_half_way_is_not_said_to_be_in_pieces(recwarn: pytest.WarningsRecorder) -> None:
    def fails(block: Any, hidden: torch.Tensor) -> torch.Tensor:
        block(hidden[:, :3])
        raise KeyError("half-way")

    model = blocks_run(FAMILIES["mixtral"].build(), fails)
    cache = PiKVCache.for_model(model, **SMALL)
    with pytest.raises(KeyError, match="half-way"):
        model(ids(1, 9), past_key_values=cache)
    assert not any("placed by position" in str(each.message) for each in recwarn)
