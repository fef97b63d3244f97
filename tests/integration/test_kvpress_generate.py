"""Presses of kvpress inside of `generate`, later calls on the compressed cache, and padded batches."""

import pytest
import torch
from kvpress_cases import ARCHITECTURES, CASES, context_and_question
from kvpress_runs import attached_cache, dense_cache, lengths_of, model_for, the_tokenizer
from transformers import DynamicCache

from pikv_hf.common.transformers_release import arguments_of_layers
from pikv_hf.presses import RowwisePress

pytestmark = pytest.mark.slow

LENGTH, NEW_TOKENS = 300, 6
#: Presses that evict while `generate` runs.
WITHIN = [pytest.param(case, id=case.id) for case in CASES if not case.after_prefill]
#: Of those, the ones that leave each token its position.
IN_PLACE = [param for param in WITHIN if param.id not in ("KeyRerotationPress", "ObservedAttentionPress")]
#: Of those, the ones that are done with the prompt, pick what to keep, and do so without chance.
PICKING = [
    param
    for param in IN_PLACE
    if not (param.values[0].decodes or param.values[0].random or param.values[0].changes_tokens)
]
CHANGING = [param for param in WITHIN if param.values[0].changes_tokens and not param.values[0].decodes]


def _ids(text):
    return the_tokenizer()(text, return_tensors="pt").input_ids


def _generate(model, cache, ids, press=None, mask=None):
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "past_key_values": cache}
    if mask is not None:
        options["attention_mask"] = mask
    if press is None:
        return model.generate(ids, **options)
    with press(model):
        return model.generate(ids, **options)


def _reference(architecture, case, ids):
    """Generate with a press on a `DynamicCache`: return output and cache, and the model to go on with."""
    how = case.attention if case.attention == "eager" else "slow"
    model = model_for(architecture, how=how)
    cache = DynamicCache()
    return _generate(model, cache, ids, case.make(model, the_tokenizer())), cache, model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", WITHIN)
def test_generate_compresses_as_with_dynamic_cache(architecture, case):
    ids = _ids(context_and_question(LENGTH)[0])
    expected, reference, _ = _reference(architecture, case, ids)
    how = "pikv" if case.attention == "sdpa" else case.attention
    model = model_for(architecture, how=how)
    cache = attached_cache(model) if how == "pikv" else dense_cache(model)
    output = _generate(model, cache, ids, case.make(model, the_tokenizer()))
    assert output.tolist() == expected.tolist()
    assert lengths_of(cache) == lengths_of(reference)


@torch.no_grad()
def _go_on(model, cache, ids, seen):
    """Continue greedily after `seen` tokens of `ids` are in a `DynamicCache`, whatever is left of them."""
    output = ids
    while output.shape[1] < ids.shape[1] + NEW_TOKENS:
        positions = torch.arange(seen, output.shape[1])[None]
        logits = model(output[:, seen:], past_key_values=cache, position_ids=positions).logits
        seen = output.shape[1]
        output = torch.cat([output, logits[:, -1:].argmax(-1)], dim=1)
    return output


@pytest.mark.parametrize("case", IN_PLACE)
def test_a_later_generate_goes_on_at_the_right_positions(case):
    context, question = context_and_question(LENGTH)
    first, reference, slow = _reference("qwen3_moe", case, _ids(context))
    ids = torch.cat([first, _ids(question)], dim=1)
    expected = _go_on(slow, reference, ids, first.shape[1] - 1)

    model = model_for("qwen3_moe")
    cache = attached_cache(model)
    _generate(model, cache, _ids(context), case.make(model, the_tokenizer()))
    assert _generate(model, cache, ids).tolist() == expected.tolist()


@pytest.mark.parametrize("case", [param for param in IN_PLACE if param.id in ("SnapKVPress", "AdaKVPress")])
def test_dynamic_cache_goes_on_where_it_is_told_to(case):
    """The reference of the test above: `generate` on a `DynamicCache` needs the position, and takes one new token."""
    if "cache_position" not in arguments_of_layers():
        pytest.skip("this release's generate() takes no cache_position, and cannot be told where to go on")
    ids = _ids(context_and_question(LENGTH)[0])
    first, reference, slow = _reference("llama", case, ids)
    expected = _go_on(slow, reference, first, first.shape[1] - 1)
    again, cache, _ = _reference("llama", case, ids)
    position = torch.tensor([again.shape[1] - 1])
    output = slow.generate(
        again, past_key_values=cache, cache_position=position, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert output.tolist() == expected.tolist()


def _padded_batch():
    rows = [_ids(context_and_question(length)[0])[0] for length in (LENGTH, 150, 220)]
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return rows, ids, mask


def _check_rows(model, make):
    rows, ids, mask = _padded_batch()
    together = _generate(model, attached_cache(model), ids, make(), mask)[:, ids.shape[1] :]
    alone = [_generate(model, attached_cache(model), row[None], make())[0, len(row) :] for row in rows]
    assert together.tolist() == torch.stack(alone).tolist()


def test_rows_of_a_padded_batch_are_the_rows_alone():
    _check_rows(model_for("qwen3_moe"), lambda: None)


def _rowwise(case, model):
    return RowwisePress(case.make(model, the_tokenizer()))


@pytest.mark.parametrize("case", PICKING)
def test_rows_of_a_padded_batch_are_compressed_as_the_rows_alone(case):
    model = model_for("qwen3_moe")
    _check_rows(model, lambda: _rowwise(case, model))


@pytest.mark.parametrize("case", CHANGING)
def test_a_press_that_changes_tokens_cannot_do_so_by_rows(case):
    model = model_for("qwen3_moe")
    _, ids, mask = _padded_batch()
    with pytest.raises(ValueError, match="padded batch"):
        _generate(model, attached_cache(model), ids, _rowwise(case, model), mask)


@pytest.mark.parametrize("case", [param for param in IN_PLACE if param.id in ("SnapKVPress", "AdaKVPress")])
def test_a_press_that_takes_padding_for_tokens_is_refused(case):
    model = model_for("qwen3_moe")
    _, ids, mask = _padded_batch()
    with pytest.raises(ValueError, match=r"padded.*RowwisePress"):
        _generate(model, attached_cache(model), ids, case.make(model, the_tokenizer()), mask)
