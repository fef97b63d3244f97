"""Every press of kvpress through kvpress's own pipeline, on a `PiKVCache` as on a `DynamicCache`."""

import functools

import kvpress
import pytest
from kvpress_cases import ARCHITECTURES, CASES, LEFT_OUT, build_model, context_and_question, exported_presses
from kvpress_runs import ask, ask_reference, assert_same, attached_cache, dense_cache, model_for, the_tokenizer
from transformers import DynamicCache

pytestmark = pytest.mark.slow

LENGTH = 300


def _prompt(case):
    """Return context and questions for a press."""
    context, question = context_and_question(LENGTH)
    # A press that goes on evicting has no state to return to for a second question.
    questions = [question] if case.decodes else [question, "What is the oldest word?"]
    return context + case.in_context, questions


@functools.cache
def _reference(architecture, case):
    return ask_reference(architecture, case, *_prompt(case))


def _run(architecture, case, how):
    """Answer with a `PiKVCache`, read in place (`how="pikv"`) or by another attention implementation."""
    model = model_for(architecture, case, how)
    press = case.make(model, the_tokenizer())
    cache = attached_cache(model) if how == "pikv" else dense_cache(model)
    return ask(model, cache, press, *_prompt(case))


def _cases(**wanted):
    chosen = (case for case in CASES if all(getattr(case, name) == value for name, value in wanted.items()))
    return [pytest.param(case, id=case.id) for case in chosen]


def test_every_exported_press_is_run_or_left_out_with_a_reason():
    run = {case.press for case in CASES}
    assert not run & set(LEFT_OUT)
    assert sorted(run | set(LEFT_OUT)) == sorted(exported_presses())


@pytest.mark.parametrize("press", [pytest.param(name, id=f"{name}: {reason}") for name, reason in LEFT_OUT.items()])
def test_what_is_left_out_runs_on_no_cache(press):
    options = {} if press == "BasePress" else {"compression_ratio": 0.5}
    context, question = context_and_question(LENGTH)
    with pytest.raises(NotImplementedError):
        ask(model_for("llama", how="sdpa"), DynamicCache(), getattr(kvpress, press)(**options), context, [question])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", _cases(attention="sdpa"))
def test_an_attached_model_answers_as_with_dynamic_cache(architecture, case):
    assert_same(_run(architecture, case, "pikv"), _reference(architecture, case))


@pytest.mark.parametrize("case", _cases(ragged_layers=False))
def test_a_cache_from_a_config_alone_answers_as_dynamic_cache(case):
    # Where kvpress marks tokens, its fake keys leave them some weight.
    tolerance = 1e-3 if case.head_wise else 1e-4
    assert_same(_run("qwen3_moe", case, case.attention), _reference("qwen3_moe", case), tolerance)


@pytest.mark.parametrize("case", _cases(attention="eager"))
def test_a_dense_model_in_eager_attention_answers_as_with_dynamic_cache(case):
    assert_same(_run("llama", case, "eager"), _reference("llama", case))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", _cases(ragged_layers=True))
def test_layers_of_different_lengths_take_a_question_in_any_attention(case, attention):
    """An attached model fits its one mask to each layer, also when it attends otherwise than by `"pikv"`."""
    reference = _reference("llama", case)
    assert len(set(reference.lengths)) > 1
    model = build_model("llama")
    cache = attached_cache(model)
    model.set_attn_implementation(attention)
    assert_same(ask(model, cache, case.make(model, the_tokenizer()), *_prompt(case)), reference)


@pytest.mark.parametrize("case", _cases(ragged_layers=True))
def test_dynamic_cache_takes_no_question_of_several_tokens_then(case):
    model = model_for("llama", how="sdpa")
    with pytest.raises(RuntimeError, match="must match"):
        ask(model, DynamicCache(), case.make(model, the_tokenizer()), *_prompt(case))


@pytest.mark.parametrize("case", [*_cases(head_wise=True), *_cases(press="SnapKVPress")])
def test_the_reference_answers_as_kvpress_alone(case):
    """Slow attention stands in for kvpress's fake keys in the tests above: it must give the answers that those give."""
    model = model_for("llama", case, "sdpa")
    theirs = ask(model, DynamicCache(), case.make(model, the_tokenizer()), *_prompt(case))
    slow = model_for("llama", case, "slow")
    ours = ask(slow, DynamicCache(), case.make(slow, the_tokenizer()), *_prompt(case))
    assert_same(ours, theirs, tolerance=1e-3)
    assert ours.marked == theirs.marked
    assert any(ours.marked) == case.head_wise


@pytest.mark.parametrize("case", _cases(head_wise=True))
def test_an_attached_model_evicts_from_a_dynamic_cache_too(case):
    model = model_for("llama", case)
    attached_cache(model)
    answer = ask(model, DynamicCache(), case.make(model, the_tokenizer()), *_prompt(case))
    assert_same(answer, _reference("llama", case), tolerance=1e-3)
