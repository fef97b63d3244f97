"""Several questions on one compressed `PiKVCache`: nothing of an earlier answer stays behind, whichever the codec."""

import pytest
from kvpress_cases import CASES, context_and_question
from kvpress_runs import ask, assert_close, attached_cache, dense_cache, lengths_of, model_for, the_tokenizer

pytestmark = pytest.mark.slow

LENGTH = 300
CODECS = ("none", "int8", "int4", "auto")
#: What a press does to a cache: picks tokens for all heads, head by head, layer by layer, or changes keys or values.
PRESSES = {
    case.id: case
    for case in CASES
    if case.id in ("SnapKVPress", "AdaKVPress", "PyramidKVPress", "KeyRerotationPress", "ThinKPress")
}
QUESTIONS = ["What is the oldest word?", "Find the number!", "Which numbers are mentioned in the provided text?"]


def _press(name, model):
    return None if name is None else PRESSES[name].make(model, the_tokenizer())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", [None, *PRESSES])
def test_each_answer_is_that_of_the_question_alone(name, codec):
    model = model_for("qwen3_moe")
    context, _ = context_and_question(LENGTH)
    codecs = {"key_codec": codec, "value_codec": codec}
    together = ask(model, attached_cache(model, **codecs), _press(name, model), context, QUESTIONS)
    steps = len(together.logits) // len(QUESTIONS)
    # The first has nothing before it.
    for index, question in list(enumerate(QUESTIONS))[1:]:
        alone = ask(model, attached_cache(model, **codecs), _press(name, model), context, [question])
        assert together.answers[index] == alone.answers[0]
        assert together.lengths == alone.lengths
        assert_close(together.logits[index * steps : (index + 1) * steps], alone.logits)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_the_codec_was_in_use(codec):
    model = model_for("qwen3_moe")
    context, _ = context_and_question(LENGTH)
    press = _press("SnapKVPress", model)
    coded = attached_cache(model, key_codec=codec, value_codec=codec)
    exact = ask(model, attached_cache(model), press, context, QUESTIONS[:1])
    packed = ask(model, coded, press, context, QUESTIONS[:1])
    difference = (exact.logits[0] - packed.logits[0]).abs().max() / exact.logits[0].abs().max()
    assert 1e-5 < difference < 1


@pytest.mark.parametrize("name", [None, "SnapKVPress", "AdaKVPress", "ThinKPress"])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_a_dense_cache_forgets_answers_too(name, codec):
    model = model_for("qwen3_moe", how="sdpa")
    context, _ = context_and_question(LENGTH)
    codecs = {"key_codec": codec, "value_codec": codec}
    alone = ask(model, dense_cache(model, **codecs), _press(name, model), context, QUESTIONS[1:2])
    together = ask(model, dense_cache(model, **codecs), _press(name, model), context, QUESTIONS[:2])
    assert together.answers[1] == alone.answers[0]
    assert_close(together.logits[len(alone.logits) :], alone.logits)


@pytest.mark.parametrize("codec", ["none", "int4"])
def test_the_cache_is_as_large_as_before_the_questions(codec):
    model = model_for("qwen3_moe")
    context, _ = context_and_question(LENGTH)
    cache = attached_cache(model, key_codec=codec, value_codec=codec)
    ask(model, cache, _press("AdaKVPress", model), context, QUESTIONS[:1])
    lengths, before = lengths_of(cache), cache.nbytes
    again = attached_cache(model, key_codec=codec, value_codec=codec)
    ask(model, again, _press("AdaKVPress", model), context, QUESTIONS)
    assert lengths_of(again) == lengths
    assert again.nbytes <= before * 1.1
