"""`LoRAPress`: ranks, errors and bytes, on a cache that stores factors and on one that does not."""

import gc
from typing import Any

import pytest
import torch
from families import FAMILIES
from press_runs import attached, ids_of, next_logits, read, shared_model
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.presses import LoRAPress, QueryAwarePress
from pikv_hf.presses.lora_press import projected, rank_of_error

pytestmark = pytest.mark.slow

TOKENS = 400


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build(head_dim=64)


def settle(cache: Any) -> None:
    """Let the last layer pack its tokens, which wait for the next call else."""
    if isinstance(cache, PiKVCache):
        assert cache.nbytes


def errors(cache: Any, whole: Any) -> torch.Tensor:
    """Return the relative error of keys and values of each layer and head, `(L, 2, H)`, of the tokens that changed."""
    settle(cache)
    found = []
    for mine, theirs in zip(cache.layers, whole.layers, strict=True):
        for part, exact in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            changed = (part != exact).any(dim=-1, keepdim=True).any(dim=1, keepdim=True)
            lost, of = ((each.double() * changed).square().sum(dim=(0, 2, 3)) for each in (part - exact, exact))
            found.append((lost / of).sqrt())
    return torch.stack(found).unflatten(0, (-1, 2))


def plain(model: Any, tokens: int = TOKENS, batch: int = 1) -> DynamicCache:
    return read(model, DynamicCache(), ids_of(tokens, batch))


@pytest.mark.parametrize("kind", ["pikv", "dynamic"])
def test_tokens_are_of_the_asked_rank_and_no_worse_than_its_best(model: Any, kind: str) -> None:
    cache = attached(model) if kind == "pikv" else DynamicCache()
    read(model, cache, ids_of(TOKENS), LoRAPress(rank=6, recent_tokens=32))
    settle(cache)
    whole = plain(model)
    for mine, theirs in zip(cache.layers, whole.layers, strict=True):
        for part, exact in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            changed = (part != exact).any(dim=-1)[0].all(dim=0)
            assert changed.sum() > 250
            assert not changed[:4].any()
            assert not changed[-16:].any()
            for head in range(part.shape[1]):
                far, best = part[0, head, changed].double(), exact[0, head, changed].double()
                assert int((torch.linalg.svdvals(far) > 1e-4 * far.norm()).sum()) == 6
                least = torch.linalg.svdvals(best)[6:].square().sum().sqrt()
                # The basis is that of whole pages, not of just these tokens.
                assert float((far - best).norm()) <= 1.02 * float(least)
    assert kind != "pikv" or cache.memory_report().total < plain_bytes(whole)


def plain_bytes(cache: DynamicCache) -> int:
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))


@pytest.mark.parametrize("kind", ["pikv", "dynamic"])
@pytest.mark.parametrize("error", [0.6, 0.3, 0.1])
def test_measured_errors_stay_within_the_asked_one(model: Any, kind: str, error: float) -> None:
    cache = attached(model) if kind == "pikv" else DynamicCache()
    read(model, cache, ids_of(TOKENS), LoRAPress(error=error, recent_tokens=16))
    found = errors(cache, plain(model))
    # A basis of whole pages is not quite that of the tokens which the rank was found by.
    assert 0.7 * error < float(found.max()) <= error * (1.02 if kind == "pikv" else 1 + 1e-5)


@pytest.mark.parametrize(("tokens", "batch"), [(1500, 1), (TOKENS, 2)])
def test_measured_errors_of_all_rows_and_pages_stay_within_the_asked_one(model: Any, tokens: int, batch: int) -> None:
    cache = read(model, attached(model), ids_of(tokens, batch), LoRAPress(error=0.2))
    assert float(errors(cache, plain(model, tokens, batch)).max()) <= 0.2 * 1.02


def test_rank_of_error_is_the_least() -> None:
    tokens = torch.randn(1, 2, 50, 8, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [9.0, 5, 3, 1, 1, 1, 0.1, 0]
    )
    every = torch.ones(1, 2, 50, dtype=torch.bool)
    for error in (0.5, 0.2, 0.05, 0.001):
        rank = rank_of_error(tokens, every, error)

        def lost(rank: int) -> float:
            rest = (tokens - projected(tokens, every, rank)).square().sum(dim=(2, 3)) / tokens.square().sum(dim=(2, 3))
            return float(rest.max().sqrt())

        assert lost(rank) <= error + 1e-6
        assert rank == 1 or lost(rank - 1) > error
    assert rank_of_error(tokens, every, 1e-9) == 7
    assert rank_of_error(tokens * 0, every, 0.1) == 1


def test_what_is_not_counted_has_no_part_in_the_basis() -> None:
    tokens = torch.zeros(1, 1, 6, 4)
    tokens[0, 0, :3, 0], tokens[0, 0, 3:, 1] = 1, 1000
    counted = (torch.arange(6) < 3).expand(1, 1, 6)
    torch.testing.assert_close(projected(tokens, counted, 1)[0, 0, :3], tokens[0, 0, :3])


@pytest.mark.parametrize(("family", "dtype"), [("qwen3_moe", torch.float32), ("deepseek_v2", torch.bfloat16)])
@pytest.mark.parametrize("share", [0.7, 0.35])
def test_a_share_is_one_of_measured_bytes(family: str, dtype: torch.dtype, share: float) -> None:
    model = FAMILIES[family].build(**({"head_dim": 64} if family == "qwen3_moe" else {})).to(dtype)
    for batch in (1, 2):
        cache = read(model, attached(model), ids_of(700, batch), LoRAPress(budget=share))
        gc.collect()
        dense = plain_bytes(plain(model, 700, batch))
        assert cache.nbytes <= share * dense
        assert cache.nbytes >= 0.75 * share * dense
    ranks = {layer.config.rank for layer in cache.layers}
    assert all(layer.config.key_codec == layer.config.value_codec == "lowrank" for layer in cache.layers)
    assert 1 <= min(ranks) <= max(ranks) < 64


def test_bytes_and_tokens_ask_for_the_same_rank_as_their_share(model: Any) -> None:
    dense = plain_bytes(plain(model, 700))
    ranks = []
    for given in ({"compression_ratio": 0.5}, {"budget": "50%"}, {"budget": 350}, {"budget": f"{dense // 2} B"}):
        cache = read(model, attached(model), ids_of(700), LoRAPress(**given))
        ranks.append([layer.config.rank for layer in cache.layers])
    assert ranks == [ranks[0]] * 4


def test_a_budget_that_exact_tokens_exceed_is_told(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        cache = read(model, attached(model, page_size=16), ids_of(150), LoRAPress(budget=0.33))
    assert "leave no room in a budget of 50 of 150" in caplog.text
    # The share of what comes after: 64 of 192 channels, less what a token costs besides.
    assert 16 < cache.layers[0].config.rank < 22


@pytest.mark.parametrize("options", [{"budget": 0.35}, {"error": 0.3}])
def test_the_first_part_of_a_prompt_chooses_a_rank_for_all_of_it(model: Any, options: dict[str, Any]) -> None:
    """The first chunk lies within the window: nothing is coded yet, and the rank must not be that of nothing."""
    cache, ids = attached(model), ids_of(600)
    press = LoRAPress(**options)
    with torch.no_grad(), press(model):
        for part in ids.split(15, dim=1):
            model.model(part, past_key_values=cache)
    [rank] = {layer.config.rank for layer in cache.layers[:1]}
    assert rank > 10
    found = errors(cache, plain(model, 600))
    assert float(found.max()) < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_those_of_projected_tokens(dtype: torch.dtype) -> None:
    model = FAMILIES["qwen3_moe"].build(head_dim=64).to(dtype)
    cache = read(model, attached(model), ids_of(TOKENS), LoRAPress(rank=24))
    settle(cache)
    dynamic = plain(model)
    for mine, theirs in zip(cache.layers, dynamic.layers, strict=True):
        theirs.keys, theirs.values = mine.keys.clone(), mine.values.clone()
    expected = next_logits(model, dynamic, TOKENS)
    # Attention works on coefficients instead of tokens: a sum more of their precision.
    tolerance = 8 * torch.finfo(dtype).eps * float(expected.abs().max()) * (8 if dtype == torch.bfloat16 else 64)
    torch.testing.assert_close(next_logits(model, cache, TOKENS), expected, atol=tolerance, rtol=0)


def test_that_nothing_is_saved_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    from pikv_hf.presses import lora_press as lora

    lora.logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    model = shared_model()
    with caplog.at_level("WARNING"):
        for _ in range(2):
            read(model, DynamicCache(), ids_of(100), LoRAPress(rank=4))
    said = [record.message for record in caplog.records if "saves no byte" in record.message]
    assert len(said) == 1
    assert "DynamicLayer" in said[0]


def test_a_cache_that_has_stored_tokens_is_refused(model: Any) -> None:
    cache = read(model, attached(model), ids_of(100))
    with pytest.raises(ValueError, match=r"has stored 100 tokens; its codecs can be chosen only before"):
        read(model, cache, ids_of(20), LoRAPress(rank=4))
    evicted = read(model, attached(model), ids_of(100), QueryAwarePress(0.5))
    with pytest.raises(ValueError, match="codecs can be chosen only before"):
        read(model, evicted, ids_of(20), LoRAPress(rank=4))


def test_a_rank_beyond_the_head_dim_keeps_everything() -> None:
    model = shared_model()
    cache = read(model, attached(model), ids_of(TOKENS), LoRAPress(rank=999))
    assert float(errors(cache, plain(model)).max()) < 1e-5
