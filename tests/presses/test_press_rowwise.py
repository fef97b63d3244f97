"""`RowwisePress`: presses of kvpress on padded rows, each as if it had come alone."""

from typing import Any

import kvpress
import pytest
import torch
from families import FAMILIES
from press_runs import ask_rows, attached, held_by, ids_of, padded, read, shared_model
from transformers import DynamicCache

from pikv_hf.presses import QueryAwarePress, RowwisePress

LENGTHS = [60, 90, 120]
INNER: dict[str, Any] = {
    "snapkv": lambda: kvpress.SnapKVPress(0.5, window_size=8),
    "knorm": lambda: kvpress.KnormPress(0.5),
    "streaming": lambda: kvpress.StreamingLLMPress(0.5),
    "adakv": lambda: kvpress.AdaKVPress(kvpress.SnapKVPress(0.5, window_size=8)),
    "critical_adakv": lambda: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(0.5, window_size=8)),
    "expected": lambda: kvpress.ExpectedAttentionPress(0.5, n_future_positions=16),
}


def kept_alone(model: Any, row: torch.Tensor, press: Any) -> list[torch.Tensor]:
    """Return what a press of kvpress keeps of one row in a `DynamicCache`, `(H, T)` bool by layer, by its keys."""
    whole = read(model, DynamicCache(), row)
    cache = read(model, DynamicCache(), row, press)
    kept = []
    for before, after, block in zip(whole.layers, cache.layers, model.model.layers, strict=True):
        same = (before.keys.unsqueeze(3) == after.keys.unsqueeze(2)).all(dim=-1).any(dim=-1)
        if (marks := getattr(block.self_attn, "masked_key_indices", None)) is not None:
            same[tuple(marks)] = False
        kept.append(same[0])
    return kept


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_each_row_keeps_what_it_keeps_alone(name: str, family: str) -> None:
    model = FAMILIES[family].build()
    rows, ids, mask = padded(LENGTHS)
    cache = read(model, attached(model), ids, RowwisePress(INNER[name]()), mask)
    for number, row in enumerate(rows):
        for held, kept in zip(held_by(cache), kept_alone(model, row, INNER[name]()), strict=True):
            assert torch.equal(held[number, :, -row.shape[1] :], kept)
            assert not held[number, :, : -row.shape[1]].any()


@pytest.mark.parametrize("name", INNER)
def test_each_row_answers_as_alone(name: str) -> None:
    model = shared_model()
    rows, ids, mask = padded(LENGTHS)
    cache = read(model, attached(model), ids, RowwisePress(INNER[name]()), mask)
    more = ids_of(4, seed=9)
    logits = ask_rows(model, cache, more, mask)
    for number, row in enumerate(rows):
        alone = read(model, attached(model), row, INNER[name]())
        expected = ask_rows(model, alone, more, torch.ones_like(row))
        torch.testing.assert_close(logits[number : number + 1], expected, atol=1e-4, rtol=0)


def test_rows_without_padding_are_left_to_the_press() -> None:
    model, ids = shared_model(), ids_of(80, batch=2)
    plain = read(model, attached(model), ids, INNER["snapkv"]())
    rowwise = read(model, attached(model), ids, RowwisePress(INNER["snapkv"]()))
    for mine, theirs in zip(rowwise.layers, plain.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)


def test_a_row_of_padding_alone_keeps_nothing_and_hurts_nobody() -> None:
    model = shared_model()
    _, ids, mask = padded([90, 90])
    mask[0] = 0
    cache = read(model, attached(model), ids, RowwisePress(INNER["knorm"]()), mask)
    for held in held_by(cache):
        assert not held[0].any()
        assert held[1].sum(dim=-1).tolist() == [45, 45]


def test_decoding_goes_on_within_the_block() -> None:
    model = shared_model()
    _, ids, mask = padded(LENGTHS)
    options = {"max_new_tokens": 6, "do_sample": False}
    inside, after = attached(model), attached(model)
    with RowwisePress(INNER["snapkv"]())(model):
        together = model.generate(ids, attention_mask=mask, past_key_values=inside, **options)
    with RowwisePress(INNER["snapkv"]())(model):
        first = model.generate(ids, attention_mask=mask, past_key_values=after, max_new_tokens=1, do_sample=False)
    wider = torch.nn.functional.pad(mask, (0, 1), value=1)
    rest = model.generate(first, attention_mask=wider, past_key_values=after, max_new_tokens=5, do_sample=False)
    assert together.tolist() == rest.tolist()


def test_the_ratio_is_the_press_s_own() -> None:
    inner = kvpress.KnormPress(0.5)
    press = RowwisePress(inner)
    press.compression_ratio = 0.25
    assert inner.compression_ratio == press.compression_ratio == 0.25


def test_what_it_cannot_do_is_refused() -> None:
    model = shared_model()
    _, ids, mask = padded(LENGTHS)
    with pytest.raises(ValueError, match=r"ThinKPress changes (keys|tokens) instead of picking some"):
        read(model, attached(model), ids, RowwisePress(kvpress.ThinKPress(0.5, window_size=8)), mask)
    with pytest.raises(ValueError, match=r"DynamicLayer cannot hold rows of different lengths"):
        read(model, DynamicCache(), ids, RowwisePress(kvpress.KnormPress(0.5)), mask)
    with pytest.raises(ValueError, match="QueryAwarePress needs no RowwisePress"):
        RowwisePress(QueryAwarePress(0.5))


def test_the_model_is_as_before() -> None:
    model = FAMILIES["qwen3_moe"].build()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), RowwisePress(kvpress.KnormPress(0.5))(model):
        raise RuntimeError("on purpose")
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
