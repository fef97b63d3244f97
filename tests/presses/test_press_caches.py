"""The same tokens are kept on every cache, for every row, whole or in chunks, with beams too."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from press_runs import (
    EVICTING,
    PRESSES,
    ask_rows,
    attached,
    held_by,
    ids_of,
    kept_columns,
    next_logits,
    padded,
    read,
    shared_model,
)
from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.presses import DuoPress, ExpertPress, LoRAPress, PiKVPress, PyramidPress, QueryAwarePress
from pikv_hf.presses import pikv_press as pikv

pytestmark = pytest.mark.slow

TOKENS = 120
#: Presses whose layers or heads keep different numbers of tokens, which other caches can only hide.
UNEVEN = ("pyramid", "headwise", "duo")


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("family", ["qwen3_moe", "llama", "deepseek_v2"])
def test_every_cache_keeps_the_same_tokens(name: str, family: str) -> None:
    if family == "llama" and name in ("expert", "random_router"):
        family = "mixtral"
    model, ids = FAMILIES[family].build(), ids_of(TOKENS)
    # As many shards as a pyramid takes for other caches.
    paged, dynamic = attached(model, num_shards=8), DynamicCache()
    kept = kept_columns(model, ids, EVICTING[name](compression_ratio=0.5), paged)
    other = kept_columns(model, ids, EVICTING[name](compression_ratio=0.5), dynamic)
    assert all(bool((~held).any()) for held in kept)
    for mine, theirs in zip(kept, other, strict=True):
        assert torch.equal(mine, theirs)
    # The fake keys by which kvpress hides marked tokens leave them some weight.
    tolerance = 1e-3 if name in UNEVEN else 1e-4
    expected = next_logits(model, dynamic, TOKENS)
    torch.testing.assert_close(next_logits(model, paged, TOKENS), expected, atol=tolerance, rtol=0)


def test_a_cache_from_a_config_alone_keeps_them_too() -> None:
    model, ids = FAMILIES["qwen3_moe"].build(), ids_of(TOKENS)
    dense = PiKVCache(model.config, PiKVConfig(page_size=8, recent_window=16))
    read(model, dense, ids, QueryAwarePress(0.5))
    dynamic = read(model, DynamicCache(), ids, QueryAwarePress(0.5))
    for mine, theirs in zip(dense.layers, dynamic.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys)
    expected = next_logits(model, dynamic, TOKENS)
    torch.testing.assert_close(next_logits(model, dense, TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_widths_are_rounded_alike_on_every_cache(share: float, caplog: pytest.LogCaptureFixture) -> None:
    pikv.logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    model, ids = FAMILIES["qwen3_moe"].build(), ids_of(300)
    paged = read(model, attached(model, page_size=32), ids, PiKVPress(budget=share))
    dynamic = DynamicCache()
    with caplog.at_level("WARNING"):
        read(model, dynamic, ids, PiKVPress(budget=share))
    assert sum("no byte is saved" in record.message for record in caplog.records) == 1
    for mine, theirs, held in zip(paged.layers, dynamic.layers, held_by(paged), strict=True):
        for part, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            # Where all heads lose equally many tokens these are gone, else they are hidden.
            other = other[held] if other.shape == part.shape else other.flatten(0, 2)
            torch.testing.assert_close(part[held], other, atol=1e-5 * float(other.abs().max()), rtol=1e-5)
    expected = next_logits(model, dynamic, 300)
    torch.testing.assert_close(next_logits(model, paged, 300), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("given", [{"compression_ratio": 0.5}, {"budget": 24}])
def test_rows_of_a_padded_batch_are_the_rows_alone(name: str, given: dict[str, Any]) -> None:
    model = shared_model()
    rows, ids, mask = padded([60, 90, TOKENS])
    together = attached(model)
    read(model, together, ids, EVICTING[name](**given), mask)
    more = ids_of(4, seed=9)
    logits = ask_rows(model, together, more, mask)
    for number, row in enumerate(rows):
        alone = attached(model)
        read(model, alone, row, EVICTING[name](**given))
        for batch, single in zip(held_by(together), held_by(alone), strict=True):
            assert torch.equal(batch[number : number + 1, :, -row.shape[1] - 4 : -4], single)
            assert not batch[number, :, : -row.shape[1] - 4].any()
        with torch.no_grad():
            expected = model(more, past_key_values=alone).logits
        torch.testing.assert_close(logits[number : number + 1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["pikv", "lora"])
def test_presses_whose_rows_share_something_pass_over_padding(name: str) -> None:
    """`PiKVPress` divides one budget over the rows, and a low-rank basis is of all of them: one row has to do."""
    model = shared_model()
    row = ids_of(90)
    ids, mask = torch.nn.functional.pad(row, (30, 0)), torch.nn.functional.pad(torch.ones_like(row), (30, 0))
    alone, together = attached(model), attached(model)
    read(model, alone, row, PRESSES[name](compression_ratio=0.5))
    read(model, together, ids, PRESSES[name](compression_ratio=0.5), mask)
    kept = held_by(alone)
    for mine, single in zip(held_by(together), kept, strict=True):
        assert torch.equal(mine[..., 30:], single)
    pairs = zip(together.layers, alone.layers, strict=True)
    # A low-rank basis has no codes.
    flipped = 0 if name == "lora" else sum(count_of_other_codes(mine, single) for mine, single in pairs)
    # The two runs' K/V differ in the last bits, so that a number half-way between two codes may be rounded either way.
    assert flipped <= 3
    with torch.no_grad():
        expected = model(ids_of(4), past_key_values=alone).logits
        exact = model(ids_of(4), past_key_values=unrounded(model, row, kept)).logits
    # One number by a whole step, a twentieth of what rounding all of some 17,000 numbers does: 2 max / (rms sqrt(n)).
    atol = 1e-4 + 0.05 * flipped * float((expected - exact).abs().max())
    torch.testing.assert_close(ask_rows(model, together, ids_of(4), mask), expected, atol=atol, rtol=0)


def count_of_other_codes(padded_layer: Any, layer: Any) -> int:
    """Return how many numbers of a layer's K/V differ by more than rounding errors of float32, padding left out."""
    pairs = ((padded_layer.keys, layer.keys), (padded_layer.values, layer.values))
    return sum(int(((mine[:, :, 30:] - single).abs() > 1e-5).sum()) for mine, single in pairs)


def unrounded(model: Any, row: torch.Tensor, kept: list[torch.Tensor]) -> PiKVCache:
    """Return a cache that keeps these tokens of a row as the model made them."""
    cache = attached(model)
    with torch.no_grad():
        model(row, past_key_values=cache)
    for layer, mask in zip(cache.layers, kept, strict=True):
        layer.settle()
        layer.keep(mask)
    return cache


def test_tokens_that_cannot_be_hidden_are_not_evicted() -> None:
    """kvpress hides tokens in the attention functions that it wraps, which eager attention is not."""
    model = FAMILIES["gpt_oss"].build()
    assert model.config._attn_implementation == "eager"
    for make in (DuoPress, PyramidPress):
        with pytest.raises(ValueError, match=r"can only be hidden, and not from attn_implementation='eager'"):
            read(model, DynamicCache(config=model.config), ids_of(TOKENS), make(0.5))
    cache = read(model, DynamicCache(config=model.config), ids_of(TOKENS), QueryAwarePress(0.5))
    assert cache.layers[1].keys.shape[2] == TOKENS // 2


@pytest.mark.parametrize("name", ["query_aware", "pyramid", "duo"])
def test_other_caches_refuse_padded_rows(name: str) -> None:
    model = shared_model()
    _, ids, mask = padded([60, TOKENS])
    with pytest.raises(ValueError, match=r"padded, and DynamicLayer cannot hold rows of different lengths"):
        read(model, DynamicCache(), ids, EVICTING[name](compression_ratio=0.5), mask)


def budget_of(name: str, tokens: int) -> float:
    """Return the most tokens per head, on average over layers and heads, that half of a context may leave."""
    if name == "duo":
        # Whole heads stream, so many that the budget holds; sinks and recent tokens are all that the least can be.
        return max(tokens / 2, 4 + 8)
    return max(tokens / 2, 4)


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("sizes", [(40, 40, 40), (100, 3, 2), (5, 60, 1)])
def test_the_budget_holds_after_every_chunk(name: str, sizes: tuple[int, ...]) -> None:
    model, ids = shared_model(), ids_of(sum(sizes))
    cache, seen = attached(model), 0
    before = None
    press = EVICTING[name](compression_ratio=0.5)
    with torch.no_grad(), press(model):
        for size in sizes:
            model.model(ids[:, seen : seen + size], past_key_values=cache)
            seen += size
            held = torch.stack(held_by(cache))
            # A single token is decoding.
            if size > 1:
                assert float(held.sum(dim=-1).float().mean()) <= budget_of(name, seen) + 1e-6
            assert held[..., :4].all()
            if before is not None:
                assert not (held[..., : before.shape[-1]] & ~before).any(), "an evicted token came back"
            before = held
            assert cache.get_seq_length() == seen


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_bytes_stay_within_the_budget_after_every_chunk(share: float) -> None:
    model, ids = FAMILIES["qwen3_moe"].build(head_dim=64), ids_of(900)
    cache, seen = attached(model, page_size=16), 0
    with torch.no_grad(), PiKVPress(budget=share)(model):
        for size in (300, 100, 40, 160, 300):
            model.model(ids[:, seen : seen + size], past_key_values=cache)
            seen += size
            # 3 layers of 2 heads, keys and values of 64 channels.
            assert cache.nbytes <= share * seen * 3 * 2 * 128 * 4
            assert all(held[..., :4].all() for held in held_by(cache))


@pytest.mark.parametrize("chunk", [32, 50])
@pytest.mark.parametrize("name", EVICTING)
def test_generate_reads_a_prompt_in_chunks(name: str, chunk: int) -> None:
    model, ids = shared_model(), ids_of(TOKENS)
    cache, by_hand = attached(model), attached(model)
    # transformers 5.2 gives every chunk the prompt's last positions, with any cache; later releases do not.
    given = []
    with EVICTING[name](compression_ratio=0.5)(model):
        handle = model.model.register_forward_pre_hook(
            lambda module, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
        )
        output = model.generate(ids, past_key_values=cache, prefill_chunk_size=chunk, max_new_tokens=4, do_sample=False)
    handle.remove()
    with torch.no_grad(), EVICTING[name](compression_ratio=0.5)(model):
        for part, at in zip(ids.split(chunk, dim=1), given, strict=False):
            logits = model(part, past_key_values=by_hand, position_ids=at).logits
    for mine, theirs in zip(held_by(cache), held_by(by_hand), strict=True):
        assert torch.equal(mine[..., :TOKENS], theirs)
        assert float(theirs.sum(dim=-1).float().mean()) <= 0.75 * TOKENS
    assert output[0, TOKENS] == logits[0, -1].argmax()


@pytest.mark.parametrize("name", ["query_aware", "headwise", "expert"])
def test_chunks_of_a_padded_batch_are_those_of_the_rows_alone(name: str) -> None:
    model = shared_model()
    rows, ids, mask = padded([80, TOKENS])
    # Both rows are cut at the same tokens from their ends.
    cuts = [TOKENS - 60, TOKENS]

    def by_chunks(tokens: torch.Tensor, attention: Any, ends: list[int]) -> list[torch.Tensor]:
        cache, start = attached(model), 0
        with torch.no_grad(), EVICTING[name](compression_ratio=0.5)(model):
            for end in ends:
                shown = None if attention is None else attention[:, :end]
                model.model(tokens[:, start:end], past_key_values=cache, attention_mask=shown)
                start = end
        return held_by(cache)

    together = by_chunks(ids, mask, cuts)
    for number, row in enumerate(rows):
        alone = by_chunks(row, None, [end - TOKENS + row.shape[1] for end in cuts])
        for mine, single in zip(together, alone, strict=True):
            assert torch.equal(mine[number : number + 1, :, -row.shape[1] :], single)


@pytest.mark.parametrize("name", PRESSES)
def test_beams_search_a_pressed_prompt(name: str) -> None:
    model, ids = shared_model(), ids_of(TOKENS)
    cache = attached(model)
    with PRESSES[name](compression_ratio=0.5)(model):
        beams = model.generate(ids, past_key_values=cache, num_beams=3, max_new_tokens=5, do_sample=False)
    assert beams.shape == (1, TOKENS + 5)
    assert len(beams[0, TOKENS:].unique()) > 1
    again = attached(model)
    read(model, again, ids.expand(3, -1), PRESSES[name](compression_ratio=0.5))
    for mine, theirs in zip(held_by(cache), held_by(again), strict=True):
        assert torch.equal(mine[..., :TOKENS], theirs)


def test_a_prompt_on_a_pressed_cache_is_pressed_too() -> None:
    """A chat's next turn: the budget is of everything that was said."""
    model = shared_model()
    cache = read(model, attached(model), ids_of(80), QueryAwarePress(0.5))
    with torch.no_grad():
        for step in range(10):
            model(torch.tensor([[5 + step]]), past_key_values=cache)
    read(model, cache, ids_of(30, seed=3), QueryAwarePress(0.5))
    assert {int(held.sum(dim=-1).max()) for held in held_by(cache)} == {60}
    assert cache.get_seq_length() == 120


def test_every_press_keeps_its_hands_off_sliding_layers() -> None:
    model, ids = FAMILIES["gpt_oss"].build(), ids_of(100)
    plain = read(model, attached(model), ids)
    for make in (QueryAwarePress, PyramidPress, ExpertPress, PiKVPress, DuoPress, LoRAPress):
        cache = read(model, attached(model), ids, make(compression_ratio=0.5))
        for mine, theirs in zip(cache.layers, plain.layers, strict=True):
            if mine.is_sliding:
                assert torch.equal(mine.keys, theirs.keys)
        assert held_by(cache)[0].all() == (make in (LoRAPress, PiKVPress))
