"""What `ContextStore.generate` gives is what `model.generate` gives, however it is asked."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from context_prompts import FIRST, GREEDY, OPTIONS, OTHER, SECOND, joined
from families import FAMILIES, VOCAB
from transformers import GenerationConfig

from pikv_hf import ContextStore, PiKVCache
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.presses import QueryAwarePress

GREEDY_ENDING = {**GREEDY, "eos_token_id": VOCAB - 1}


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["qwen3_moe"].build()


def test_beams_sampling_and_several_sequences(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    prompt = joined(FIRST, SECOND)
    ways: list[dict[str, Any]] = [
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "temperature": 1.5, "num_return_sequences": 3},
        {"do_sample": True},
        {"num_beams": 2, "do_sample": False, "num_return_sequences": 2},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True},
        {"do_sample": False, "prefill_chunk_size": 13},
    ]
    for way in ways:
        outputs = []
        for generate in (model.generate, store.generate):
            torch.manual_seed(7)
            # transformers' own chunks have the positions of the prompt's end on some releases; those of a store do not.
            given = {**way, "prefill_chunk_size": None} if generate == model.generate else way
            output = generate(prompt, max_new_tokens=6, pad_token_id=0, eos_token_id=VOCAB - 1, **given)
            outputs.append(output if isinstance(output, torch.Tensor) else output.sequences)
        assert torch.equal(*outputs), way
    assert store.stats().hits == len(ways) - 1


def batch_of(*rows: torch.Tensor, more: int = 0) -> dict[str, torch.Tensor]:
    """Return rows padded on the left to the longest, and `more`."""
    length = max(row.shape[1] for row in rows) + more
    padded = [joined(torch.zeros((1, length - row.shape[1]), dtype=torch.long), row) for row in rows]
    ids = torch.cat(padded)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def test_equal_rows_are_read_once(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    store.generate(FIRST, **GREEDY)
    equal = FIRST.repeat(3, 1)
    assert torch.equal(store.generate(equal, **GREEDY), model.generate(equal, **GREEDY))
    assert (store.stats().hits, store.stats().misses) == (1, 1)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_batches_of_different_prompts(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    store = ContextStore(model, path=tmp_path, **OPTIONS)
    batches = [
        batch_of(joined(FIRST, SECOND), joined(FIRST, OTHER)),
        batch_of(joined(FIRST, SECOND, OTHER), joined(FIRST, OTHER[:, :9])),
        batch_of(joined(FIRST, SECOND), FIRST, joined(SECOND, FIRST), more=3),
        batch_of(joined(FIRST, SECOND, FIRST), joined(FIRST, SECOND, OTHER)),
    ]
    ways: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}]
    reused = []
    for batch in batches:
        for way in ways:
            before = store.stats().tokens_reused
            outputs = []
            for generate in (model.generate, store.generate):
                torch.manual_seed(3)
                outputs.append(generate(**batch, **{**GREEDY, **way}))
            assert torch.equal(*outputs)
            reused.append(store.stats().tokens_reused - before)
    # Both rows of the first are known but for their last tokens once they have been read.
    assert reused[:3] == [0, 138, 138]
    # Of the third there is a row of which nothing is known, when it comes first.
    assert [number for number, count in enumerate(reused) if not count] == [0, 6]
    single = [joined(FIRST, SECOND, OTHER), joined(SECOND, FIRST)]
    for prompt in single:
        before = store.stats().tokens_reused
        assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        assert store.stats().tokens_reused - before == prompt.shape[1] - 1


def test_what_goes_past_the_store(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    inside = batch_of(FIRST)
    inside["attention_mask"][0, 7] = 0
    padded = batch_of(FIRST, more=5)
    for given in (inside, {"input_ids": padded["input_ids"]}, {"input_ids": FIRST, "prompt_lookup_num_tokens": 2}):
        assert torch.equal(store.generate(**given, **GREEDY_ENDING), model.generate(**given, **GREEDY_ENDING))
    assert store.stats().not_reusable == 3
    assert len(store) == 0
    assert torch.equal(store.generate(**padded, **GREEDY), model.generate(**padded, **GREEDY))
    assert store.get(FIRST)[1] == 39


@pytest.mark.parametrize("kind", ["kvpress", "pikv"])
def test_a_press_at_work_goes_past_the_store(model: Any, kind: str) -> None:
    kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")
    press = kvpress.KnormPress(0.5) if kind == "kvpress" else QueryAwarePress(0.5)
    store = ContextStore(model, **OPTIONS)
    store.generate(FIRST, **GREEDY)
    prompt = joined(FIRST, SECOND)
    cache, _ = store.get(prompt)
    with press(model), torch.no_grad():
        assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
        cache = PiKVCache.for_model(model, **OPTIONS)
        model(prompt, **cache_argument(cache))
    with pytest.raises(ValueError, match="evicted"):
        store.put(prompt, cache)
    assert store.stats().not_reusable == 1
    assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_length_are_refused(kind: str) -> None:
    model = FAMILIES["llama"].build()
    model.config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=kind):
        ContextStore(model, placement="hash")


def test_prompts_of_one_token_and_settings_of_the_model(model: Any) -> None:
    store = ContextStore(model, least=1, **OPTIONS)
    for prompt in (FIRST[:, :1], FIRST[:, :2], FIRST[:, :1]):
        assert torch.equal(store.generate(prompt, **GREEDY), model.generate(prompt, **GREEDY))
    padded = batch_of(FIRST, more=5)["input_ids"]
    before = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.update(pad_token_id=0, num_beams=2)
        given = {"generation_config": GenerationConfig(max_new_tokens=6, do_sample=False)}
        for prompt in (padded, FIRST):
            assert torch.equal(store.generate(prompt, **given), model.generate(prompt, **given))
    finally:
        model.generation_config = before
    assert store.stats().not_reusable == 1
    # What is not known to say nothing of K/V goes past the store.
    with pytest.raises(ValueError, match="adapter_names"):
        store.generate(FIRST, adapter_names=["b"], **GREEDY)
    assert store.stats().not_reusable == 2


def test_a_model_that_remembers_positions_is_refused() -> None:
    model = FAMILIES["llama"].build()
    model.model.rope_deltas = None
    with pytest.raises(ValueError, match="rope_deltas"):
        ContextStore(model, placement="hash")


def test_what_decides_on_caches_is_refused_or_understood(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    assert torch.equal(store.generate(FIRST, use_cache=True, **GREEDY), model.generate(FIRST, **GREEDY))
    for given, said in (({"use_cache": False}, "use_cache=False"), ({"cache_implementation": "static"}, "'static'")):
        with pytest.raises(TypeError, match=said):
            store.generate(FIRST, **given, **GREEDY)
    assert store.stats().misses == 1


def test_what_a_known_prompt_saves_is_counted(model: Any) -> None:
    store = ContextStore(model, **OPTIONS)
    store.generate(FIRST, **GREEDY)
    assert store.stats().seconds_saved == 0
    store.generate(FIRST, **GREEDY)
    # At the speed of the 39 tokens that were read.
    assert store.stats().seconds_saved == pytest.approx(store.stats().seconds_read, rel=0.2)


def test_an_answer_is_not_lost_when_it_cannot_be_remembered(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> bool:
        raise ValueError("not now")

    store = ContextStore(model, **OPTIONS)
    monkeypatch.setattr(store, "put", refused)
    with pytest.warns(UserWarning, match="not remembered: not now"):
        assert torch.equal(store.generate(FIRST, **GREEDY), model.generate(FIRST, **GREEDY))
