"""The two protocols against kvpress's own pipeline and plain `generate`; bytes against those counted by hand."""

import random

import pytest
import torch
from families import FAMILIES
from transformers import DynamicCache, pipeline

from pikv_hf.eval.runner.caches import cache_factory
from pikv_hf.eval.runner.memory_meter import DynamicFootprint, PeakMemory, stored_bytes
from pikv_hf.eval.runner.meter import Meter
from pikv_hf.eval.runner.perplexity import score_window
from pikv_hf.eval.runner.presses import press_factory
from pikv_hf.eval.runner.protocol import Asker, Encoded
from pikv_hf.eval.tasks import reference
from pikv_hf.eval.tasks.perplexity import reference_windows, text_windows

pytestmark = pytest.mark.slow

PRESSES = (
    None,
    "KnormPress",
    "SnapKVPress",
    "ExpectedAttentionPress",
    "TOVAPress",
    "StreamingLLMPress",
    "AdaKVPress(SnapKVPress)",
    "KeyRerotationPress(StreamingLLMPress)",
    "DecodingPress(KnormPress, compression_interval=8, target_size=64)",
)


@pytest.fixture(scope="module")
def samples():
    return reference.generate(300, 1)


@pytest.mark.parametrize("spec", PRESSES)
def test_answers_are_those_of_kvpress_pipeline(reference_model, samples, spec):
    model, tokenizer = reference_model
    theirs = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu")
    ours = Asker(model, tokenizer)
    ratio = None if spec is None or "Decoding" in spec else 0.5
    for sample in samples:
        press = None if spec is None else press_factory(spec, ratio)
        expected = theirs(
            sample.context,
            question=sample.question,
            answer_prefix=sample.answer_prefix,
            press=press and press.make(),
            max_new_tokens=sample.max_new_tokens,
        )["answer"]
        answer = ours.ask(ours.encode(sample), DynamicCache(), press and press.make())
        assert answer.text == expected


def test_query_aware_answers_are_those_of_generate(reference_model, samples):
    model, tokenizer = reference_model
    asker = Asker(model, tokenizer)
    for sample in samples:
        prompt = tokenizer(f"{sample.context}{sample.question}\n{sample.answer_prefix}", return_tensors="pt").input_ids
        with press_factory("SnapKVPress", 0.5).make()(model):
            output = model.generate(prompt, max_new_tokens=48, do_sample=False)
        [answer] = asker.ask_together([asker.encode(sample)], DynamicCache(), press_factory("SnapKVPress", 0.5).make())
        assert answer.text == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("spec", ["dynamic", "pikv"])
@pytest.mark.parametrize("together", [False, True])
def test_padded_batches_answer_like_single_samples(reference_model, spec, together):
    model, tokenizer = reference_model
    cache, asker = cache_factory(spec), Asker(model, tokenizer)
    samples = [
        reference.generate(length, 1, tasks=[task])[0]
        for length, task in zip((150, 400, 260), ("niah_single_2", "niah_multiquery", "vt"), strict=True)
    ]
    with cache.prepare(model):
        encoded = [asker.encode(sample) for sample in samples]
        # The limits differ: a row that has reached its own waits for the others.
        encoded[0] = Encoded(encoded[0].context, encoded[0].question, 3)
        if together:
            batch = asker.ask_together(encoded, cache.make(model))
            single = [asker.ask_together([one], cache.make(model))[0] for one in encoded]
        else:
            batch = asker.ask_batch(encoded, cache.make(model))
            single = [asker.ask(one, cache.make(model)) for one in encoded]
    assert [(a.text, a.context_tokens, a.question_tokens, a.new_tokens) for a in batch] == [
        (a.text, a.context_tokens, a.question_tokens, a.new_tokens) for a in single
    ]
    assert batch[0].new_tokens == 3
    assert [answer.rows for answer in batch] == [3] * 3


def test_a_question_that_is_answered_by_an_end_token_alone(reference_model, samples):
    model, tokenizer = reference_model
    asker = Asker(model, tokenizer)
    encoded = asker.encode(samples[0])
    first = model(torch.cat([encoded.context, encoded.question], dim=1)).logits[0, -1].argmax().item()
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [first, before]
    try:
        answer = asker.ask(encoded, DynamicCache())
    finally:
        model.generation_config.eos_token_id = before
    assert answer.new_tokens == 1


@pytest.mark.parametrize("family", ["mixtral", "mixtral_sliding", "gpt_oss", "deepseek_v3", "llama"])
def test_the_footprint_is_what_dynamic_cache_holds(family):
    model = FAMILIES[family].build()
    footprint = DynamicFootprint.of(model)
    cache = DynamicCache(config=model.config)
    ids = torch.randint(1, 190, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
        # A sliding layer lets go of the prompt at the next step.
        model(input_ids=ids[:, -1:], past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert footprint.own_bytes(50) == held
    assert footprint.bf16_bytes(50) == held // 2


def test_stored_bytes_count_a_view_with_all_that_it_keeps_alive():
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 100, 8)
    cache.update(keys, keys.clone(), 0)
    assert stored_bytes(cache) == 2 * 100 * 8 * 2 * 4
    cache.layers[0].keys = cache.layers[0].keys[:, :, :1]
    assert stored_bytes(cache) == 2 * 100 * 8 * 2 * 4
    cache.layers[0].keys = cache.layers[0].keys.clone()
    assert stored_bytes(cache) == 2 * 101 * 8 * 4


def test_stored_bytes_of_a_pikv_cache_are_its_own(reference_model, samples):
    model, tokenizer = reference_model
    factory = cache_factory("pikv")
    with factory.prepare(model):
        asker, cache = Asker(model, tokenizer), factory.make(model)
        cost = asker.ask(asker.encode(samples[0]), cache).cost
    assert cost.kv_bytes_end == cache.nbytes == stored_bytes(cache)


def test_a_quantized_cache_counts_its_packed_integers(reference_model, samples):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    model, tokenizer = reference_model
    asker, factory = Asker(model, tokenizer), cache_factory("quantized:quanto:4")
    encoded = asker.encode(samples[0])
    answer = asker.ask(encoded, factory.make(model))
    full = DynamicFootprint.of(model).own_bytes(encoded.context.shape[1])
    # 4 of 32 bits, and a scale and a shift of 64 bits together for each group of 64 elements.
    assert full * 5 / 32 * 0.9 < answer.cost.kv_bytes_prefill < full * 5 / 32 * 1.3


def test_peak_memory_sees_what_was_allocated_after_the_reset():
    peak = PeakMemory(torch.device("cpu"))
    peak.reset()
    before = peak.process_bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak.process_bytes() - before > 32 << 20
    del block
    assert peak.cuda_bytes() is None


@pytest.mark.parametrize("prefill", [0, 40])
def test_chunked_perplexity_is_that_of_one_forward(reference_model, prefill):
    model, tokenizer = reference_model
    ids = tokenizer(reference.generate(300, 1)[0].context, return_tensors="pt").input_ids[0]
    [window] = text_windows(ids[:120], 120, 1, prefill)
    with torch.no_grad():
        likelihoods = torch.log_softmax(model(window.ids).logits[0], -1)
    read = max(prefill, 1)
    expected = -sum(likelihoods[i - 1, window.ids[0, i]].item() for i in range(read, 120)) / (120 - read)
    for spec in ("dynamic", "pikv"):
        cache = cache_factory(spec)
        with cache.prepare(model):
            loss = score_window(model, window, 17, cache.make(model), None, Meter(model.device))
        assert loss.scored == 120 - read
        assert loss.nats == pytest.approx(expected, abs=1e-4)


def test_reference_windows_score_answers_only(reference_model):
    _, tokenizer = reference_model
    [window] = reference_windows(tokenizer, 500, 1, 0, torch.device("cpu"))
    assert window.ids.shape[1] <= 500
    assert not window.scored[: window.prefill].any()
    scored = tokenizer.decode(window.ids[0][window.scored])
    assert scored.count("<eos>") == 6
    assert "What" not in scored


def test_text_windows_are_distinct_and_within_the_text():
    ids = torch.arange(100)
    windows = text_windows(ids, 30, 5, 10)
    assert [int(window.ids[0, 0]) for window in windows] == [0, 18, 35, 52, 70]
    assert all(window.ids.shape == (1, 30) and window.scored.sum() == 20 for window in windows)
    assert len(text_windows(ids, 99, 5, 10)) == 2
    with pytest.raises(ValueError, match="100 tokens, fewer than one window of 101"):
        text_windows(ids, 101, 1, 10)


def test_random_presses_draw_the_same_in_any_order(reference_model, samples):
    from pikv_hf.eval.runner.jobs import seed_for

    model, tokenizer = reference_model
    asker, press = Asker(model, tokenizer), press_factory("RandomPress", 0.5)
    encoded = {sample.id: asker.encode(sample) for sample in samples}

    def answers(order):
        found = {}
        for name in order:
            seed_for(1, name)
            found[name] = asker.ask(encoded[name], DynamicCache(), press.make()).text
        return found

    order = list(encoded)
    shuffled = random.Random(0).sample(order, len(order))
    assert answers(order) == answers(shuffled)


def test_prompts_are_kvpress_own_with_a_chat_template(reference_model, samples):
    model, tokenizer = reference_model
    template = "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}{% endfor %}<eos>answer:"
    before = tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        asker, sample = Asker(model, tokenizer), samples[0]
        theirs = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer, device="cpu").preprocess(
            sample.context, [sample.question], sample.answer_prefix, 10_000
        )
        ours = asker.encode(sample)
    finally:
        tokenizer.chat_template = before
    assert torch.equal(ours.context, theirs["context_ids"])
    assert torch.equal(ours.question, theirs["questions_ids"][0])


def test_a_tokenizer_needs_no_beginning_of_text_token(reference_model, samples):
    model, tokenizer = reference_model
    before = tokenizer.bos_token
    tokenizer.bos_token = None
    try:
        encoded = Asker(model, tokenizer).encode(samples[0])
    finally:
        tokenizer.bos_token = before
    assert tokenizer.decode(encoded.context[0]).startswith("A special magic number")
