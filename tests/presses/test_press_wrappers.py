"""This project's presses through kvpress's pipeline, alone and within kvpress's wrappers, on both caches."""

from pathlib import Path
from typing import Any

import kvpress
import pytest
import torch
from kvpress_cases import context_and_question
from kvpress_runs import ask, assert_close, assert_same, attached_cache, model_for, the_tokenizer
from press_runs import EVICTING, PRESSES, attached, held_by, ids_of, next_logits, read, shared_model
from transformers import DynamicCache

from pikv_hf.presses import DuoPress, ExpertPress, PiKVPress, PyramidPress, QueryAwarePress

pytestmark = pytest.mark.slow

LENGTH = 300
QUESTIONS = ["What is the oldest word?", "Find the number!"]


def ours(ratio: float = 0.5, **options: Any) -> QueryAwarePress:
    return QueryAwarePress(ratio, window=16, **options)


def decoding(press: Any) -> Any:
    return kvpress.DecodingPress(press, compression_interval=3, target_size=90)


WRAPPED: dict[str, Any] = {
    "adakv": lambda: kvpress.AdaKVPress(ours()),
    "adakv_share": lambda: kvpress.AdaKVPress(QueryAwarePress(budget="50%", window=16)),
    "adakv_expert": lambda: kvpress.AdaKVPress(ExpertPress(0.5, window=16)),
    "critical": lambda: kvpress.CriticalKVPress(ours()),
    "critical_adakv": lambda: kvpress.CriticalAdaKVPress(ours()),
    "chunk": lambda: kvpress.ChunkPress(ours(), chunk_length=100),
    "block": lambda: kvpress.BlockPress(ours(), block_size=64),
    "rerotated": lambda: kvpress.KeyRerotationPress(ours()),
    "per_layer": lambda: kvpress.PerLayerCompressionPress(ours(), [0.5, 0.5, 0.5]),
    "before_think": lambda: kvpress.ComposedPress([ours(), kvpress.ThinKPress(0.25, window_size=16)]),
    "after_knorm": lambda: kvpress.ComposedPress([kvpress.KnormPress(0.3), ours(0.4)]),
    "before_snapkv": lambda: kvpress.ComposedPress([ours(0.3), kvpress.SnapKVPress(0.3, window_size=16)]),
    "expert_before_knorm": lambda: kvpress.ComposedPress([ExpertPress(0.3, window=16), kvpress.KnormPress(0.3)]),
    "decoding": lambda: decoding(ours(0.0)),
    "prefill_decoding": lambda: kvpress.PrefillDecodingPress(ours(), decoding(kvpress.KnormPress())),
    "prefill_decoding_ours": lambda: kvpress.PrefillDecodingPress(kvpress.KnormPress(0.5), decoding(ours(0.0))),
}
#: Evict by marks, which a `DynamicCache` only hides, by fake keys that have some weight.
MARKING = ("adakv", "adakv_share", "adakv_expert", "critical_adakv")

#: Hide tokens as well, as their layers or heads keep different numbers.
UNEVEN = ("pyramid", "headwise", "duo")


@pytest.fixture(scope="module", autouse=True)
def head_scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give `DuoPress` a file of its own: these models are called by the bundled one's folder, whose heads differ."""
    SCORES.append(tmp_path_factory.mktemp("heads") / "scores.json")
    return SCORES[-1]


SCORES: list[Path] = []


def pipeline_run(press: Any, kind: str, questions: list[str], how: str = "pikv") -> Any:
    model = model_for("qwen3_moe", how=how)
    if isinstance(press, DuoPress):
        press.head_scores = SCORES[-1]
    context, _ = context_and_question(LENGTH)
    # As many shards as a pyramid takes for other caches.
    cache = attached_cache(model, num_shards=8) if kind == "pikv" else DynamicCache()
    return ask(model, cache, press, context, questions)


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_presses_answer_alike_on_both_caches(name: str) -> None:
    questions = QUESTIONS[:1] if "decoding" in name else QUESTIONS
    paged = pipeline_run(WRAPPED[name](), "pikv", questions)
    dynamic = pipeline_run(WRAPPED[name](), "dynamic", questions, "sdpa")
    assert_same(paged, dynamic, tolerance=1e-3 if name in MARKING else 1e-4)
    plain = pipeline_run(None, "pikv", questions)
    assert (paged.logits - plain.logits).abs().max() > 1e-2
    assert bool(sum(dynamic.marked)) == (name in MARKING)


def test_a_press_that_was_told_of_the_model_scores_as_one_that_was_not() -> None:
    """`PerLayerCompressionPress` does not tell: the queries of the call are then made again."""
    alone = pipeline_run(ours(), "dynamic", QUESTIONS[:1], "sdpa")
    per_layer = pipeline_run(WRAPPED["per_layer"](), "dynamic", QUESTIONS[:1], "sdpa")
    assert_same(per_layer, alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_queries_made_again_are_those_of_this_call(attention: str) -> None:
    """An observer left behind while the model was attached must not speak of a later prompt."""
    model = model_for("qwen3_moe", how="sdpa")
    read(model, DynamicCache(), ids_of(150, seed=5), kvpress.AdaKVPress(ours()))
    model.set_attn_implementation(attention)
    left = read(model, DynamicCache(), ids_of(120), kvpress.PerLayerCompressionPress(ours(), [0.5] * 3))
    expected = read(shared_like(model), DynamicCache(), ids_of(120), ours())
    model.set_attn_implementation("sdpa")
    for mine, theirs in zip(left.layers, expected.layers, strict=True):
        assert mine.keys.shape[2] == 60
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=1e-4)


def shared_like(model: Any) -> Any:
    """Return another model of the same weights."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("sdpa")
    return twin


def test_another_press_may_not_change_layers_before_a_joint_one_decides() -> None:
    model = shared_model()
    composed = kvpress.ComposedPress([PyramidPress(0.5), kvpress.KnormPress(0.5)])
    for cache in (attached(model), DynamicCache()):
        with pytest.raises(ValueError, match=r"PyramidPress decides when all layers are read.*Put it last"):
            read(model, cache, ids_of(100), composed)
    for last, kept in ((PyramidPress(0.5, window=8), 300), (PiKVPress(0.5), 600)):
        cache = read(model, attached(model), ids_of(200), kvpress.ComposedPress([kvpress.KnormPress(0.5), last]))
        assert cache.get_seq_length() == 200
        assert 0.4 * kept < sum(int(held.sum()) for held in held_by(cache)) <= kept


@pytest.mark.parametrize("name", PRESSES)
@pytest.mark.parametrize("kind", ["pikv", "dynamic"])
def test_each_answer_is_that_of_the_question_alone(name: str, kind: str) -> None:
    how = "pikv" if kind == "pikv" else "sdpa"
    together = pipeline_run(PRESSES[name](compression_ratio=0.5), kind, QUESTIONS, how)
    steps = len(together.logits) // 2
    alone = pipeline_run(PRESSES[name](compression_ratio=0.5), kind, QUESTIONS[1:], how)
    assert together.answers[1] == alone.answers[0]
    assert together.lengths == alone.lengths
    assert_close(together.logits[steps:], alone.logits, 1e-3 if kind == "dynamic" and name in UNEVEN else 1e-4)


@pytest.mark.parametrize("name", EVICTING)
def test_answers_are_the_same_on_both_caches(name: str) -> None:
    paged = pipeline_run(EVICTING[name](compression_ratio=0.5), "pikv", QUESTIONS)
    dynamic = pipeline_run(EVICTING[name](compression_ratio=0.5), "dynamic", QUESTIONS, "sdpa")
    assert paged.answers == dynamic.answers
    assert_close(paged.logits, dynamic.logits, 1e-3 if name in UNEVEN else 1e-4)


def test_a_share_is_a_ratio_to_wrappers() -> None:
    assert QueryAwarePress(budget="25%").compression_ratio == 0.75
    assert kvpress.AdaKVPress(QueryAwarePress(budget=0.1)).compression_ratio == pytest.approx(0.9)


def test_heads_compete_within_adakv() -> None:
    model = shared_model()
    cache = read(model, attached(model), ids_of(200), kvpress.AdaKVPress(ours(0.5)))
    # The last layer takes its marks when the cache is looked at.
    assert cache.nbytes
    counts = torch.stack([held.sum(dim=-1)[0] for held in held_by(cache)])
    assert counts.sum(dim=-1).tolist() == [200] * 3
    assert (counts[:, 0] != counts[:, 1]).any()


def test_the_tokenizer_of_the_bundled_model_is_used() -> None:
    """Contexts of the tests above are as long as they say."""
    context, _ = context_and_question(LENGTH)
    assert 200 < len(the_tokenizer()(context).input_ids) <= LENGTH


def test_duo_presses_compose() -> None:
    model = shared_model()
    press = kvpress.ComposedPress([DuoPress(0.5, recent_tokens=8)])
    alone = read(model, attached(model), ids_of(100), DuoPress(0.5, recent_tokens=8))
    composed = read(model, attached(model), ids_of(100), press)
    torch.testing.assert_close(next_logits(model, composed, 100), next_logits(model, alone, 100), atol=1e-4, rtol=0)
    assert press.compression_ratio == pytest.approx(0.5)
