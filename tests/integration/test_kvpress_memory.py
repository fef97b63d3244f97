"""Head-wise presses of kvpress free memory on a `PiKVCache`, and change no answer by it."""

import functools
from contextlib import nullcontext

import pytest
import torch
from kvpress_cases import CASES, context_and_question
from kvpress_runs import ask, assert_close, assert_same, attached_cache, model_for, the_tokenizer
from transformers import DynamicCache

pytestmark = pytest.mark.slow

#: Long enough that pages that are not full, and what is kept per page, do not count.
LENGTH, NEW_TOKENS = 2000, 4
OPTIONS = {"page_size": 16, "recent_window": 16, "num_shards": 1}
#: Presses that evict exactly half, or nearly.
HALVING = (
    "AdaKVPress",
    "CriticalAdaKVPress",
    "DMSPress",
    "DuoAttentionPress",
    "FastKVzipPress",
    "KVgradPress",
    "KVzipPress",
    "KVzipPress-plus",
    "LUKVPress",
)
#: KVCompose reads the context twice and leaves both in the cache, so it has nothing to be compared with.
HEAD_WISE = {case.id: case for case in CASES if case.head_wise and case.press != "KVComposePress"}


@functools.cache
def _bytes_without_a_press():
    model = model_for("llama")
    cache = attached_cache(model, **OPTIONS)
    context, question = context_and_question(LENGTH)
    ask(model, cache, None, context, [question], new_tokens=NEW_TOKENS)
    return cache.nbytes


@pytest.mark.parametrize("name", HEAD_WISE)
def test_evicted_tokens_are_freed_head_by_head(name):
    case = HEAD_WISE[name]
    context, question = context_and_question(LENGTH)
    model = model_for("llama", case, "sdpa")
    dynamic = DynamicCache()
    reference = ask(model, dynamic, case.make(model, the_tokenizer()), context, [question], new_tokens=NEW_TOKENS)
    model = model_for("llama", case)
    cache = attached_cache(model, **OPTIONS)
    run = ask(model, cache, case.make(model, the_tokenizer()), context, [question], new_tokens=NEW_TOKENS)
    # The fake keys by which kvpress hides tokens leave them some weight.
    assert_same(run, reference, tolerance=1e-3)

    everything = model.config.num_key_value_heads * sum(reference.lengths)
    share = 1 - sum(reference.marked) / everything
    if name in HALVING:
        assert 0.48 < share < 0.52
        assert cache.nbytes <= 0.55 * _bytes_without_a_press()
    else:
        assert cache.nbytes <= (share + 0.05) * _bytes_without_a_press()
    # A `DynamicCache` keeps what is only marked.
    assert sum(layer.keys[0, :, :, 0].numel() for layer in dynamic.layers) == everything


@pytest.mark.parametrize("other", ["pikv", "dynamic"])
@torch.no_grad()
def test_marks_for_one_cache_evict_nothing_from_another(other):
    """A mark does not say whose token it is: two caches of one model take turns, one of them compressed head-wise."""
    model = model_for("llama")
    ids = the_tokenizer()(context_and_question(300)[0], return_tensors="pt").input_ids

    def read(cache, press=None):
        with press(model) if press is not None else nullcontext():
            model.model(ids, past_key_values=cache)
        return cache

    def next_logits(cache):
        steps = [model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1] for token in (5, 6, 7)]
        return torch.stack(steps)

    def make():
        return attached_cache(model) if other == "pikv" else DynamicCache()

    press = functools.partial(HEAD_WISE["AdaKVPress"].make, model, the_tokenizer())
    expected = next_logits(read(attached_cache(model)))
    compressed = next_logits(read(make(), press()))
    first, second = read(attached_cache(model)), read(make(), press())
    assert_close(next_logits(first), expected)
    if other == "pikv":
        # kvpress's own marks are lost to a `DynamicCache` when another cache is used in between.
        assert_close(next_logits(second), compressed)
