"""`DuoPress`: which heads look things up, where that is kept, and what streaming heads keep."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from press_runs import attached, held_by, ids_of, padded, read, shared_model
from transformers import DynamicCache

import pikv_hf.presses.duo_press as duo
from pikv_hf.presses import DuoPress
from pikv_hf.presses.retrieval_heads import HeadScores, find_head_scores

#: Frequencies so low that hardly a channel is turned.
NO_ROTATION = {"rope_type": "default", "rope_theta": 1e30}
SCORES = HeadScores({0: (0.5, 0.1), 1: (0.2, 0.9), 2: (0.3, 0.4)}, "qwen3_moe")


def scores_file(folder: Path, scores: HeadScores = SCORES) -> Path:
    file = folder / "scores.json"
    file.write_text(json.dumps(scores.to_dict()))
    return file


def saved_model(folder: Path, seed: int = 0, family: str = "qwen3_moe", **options: Any) -> Any:
    """Return a model that counts as loaded from a folder."""
    model = FAMILIES[family].build(seed=seed, **options)
    model.config.name_or_path = str(folder)
    return model


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Count the searches, and make them cheap."""
    done = []

    def find(model: Any, **options: Any) -> HeadScores:
        done.append(model)
        return find_head_scores(model, samples=1, tokens=64)

    monkeypatch.setattr(duo, "find_head_scores", find)
    return done


@pytest.mark.parametrize(
    ("ratio", "streaming"),
    # A streaming head keeps 12 of 120 tokens: n of 6 of them leave 1 - 0.15 n.
    [(0.1, 1), (0.15, 1), (0.16, 2), (0.5, 4), (0.6, 4), (0.75, 5), (0.9, 6)],
)
def test_the_lowest_heads_stream_as_many_as_the_budget_asks_for(tmp_path: Path, ratio: float, streaming: int) -> None:
    model = shared_model()
    press = DuoPress(ratio, recent_tokens=8, head_scores=scores_file(tmp_path))
    held = torch.cat(held_by(read(model, attached(model), ids_of(120), press)))
    order = [(0, 1), (1, 0), (2, 0), (2, 1), (0, 0), (1, 1)]
    near = torch.zeros(120, dtype=torch.bool)
    near[:4] = near[-8:] = True
    for place, (layer, head) in enumerate(order):
        assert torch.equal(held[layer, head], near if place < streaming else torch.ones_like(near))
    assert float(held.float().mean()) <= 1 - ratio + 1e-6


def test_rows_of_different_length_stream_by_their_own(tmp_path: Path) -> None:
    model = shared_model()
    _, ids, mask = padded([20, 120])
    press = DuoPress(0.3, recent_tokens=8, head_scores=scores_file(tmp_path))
    held = torch.stack(held_by(read(model, attached(model), ids, press, mask)))
    assert int((held[:, 1].sum(dim=-1) == 12).sum()) == 2
    assert int((held[:, 0].sum(dim=-1) == 12).sum()) == 5


def test_a_budget_below_what_streaming_heads_keep_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = shared_model()
    with caplog.at_level("WARNING"):
        press = DuoPress(budget=7, recent_tokens=9, head_scores=scores_file(tmp_path))
        cache = read(model, attached(model), ids_of(50), press)
    assert {int(count) for held in held_by(cache) for count in held.sum(dim=-1).flatten()} == {13}
    assert "14.0% of 50 tokens is less than 13 sink and recent tokens" in caplog.text


def test_scores_are_kept_next_to_the_model_and_read_again(tmp_path: Path, searches: list[Any]) -> None:
    model = saved_model(tmp_path)
    first = held_by(read(model, attached(model), ids_of(120), DuoPress(0.5)))
    file = tmp_path / duo.FILE_NAME
    written = file.read_text()
    second = held_by(read(model, attached(model), ids_of(120), DuoPress(0.5)))
    assert len(searches) == 1
    assert file.read_text() == written
    for mine, theirs in zip(first, second, strict=True):
        assert torch.equal(mine, theirs)
    assert HeadScores.from_dict(json.loads(written)) == find_head_scores(model, samples=1, tokens=64)


def test_scores_of_a_given_path_are_written_there(tmp_path: Path, searches: list[Any]) -> None:
    file = tmp_path / "mine.json"
    model = saved_model(tmp_path)
    read(model, attached(model), ids_of(60), DuoPress(0.5, head_scores=file))
    assert file.is_file()
    assert not (tmp_path / duo.FILE_NAME).exists()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none"))):
        read(model, attached(model), ids_of(60), DuoPress(0.5, head_scores=tmp_path / "none" / "mine.json"))


def test_a_model_in_no_folder_is_searched_once_per_press(searches: list[Any]) -> None:
    model = FAMILIES["llama"].build()
    press = DuoPress(0.5)
    for _ in range(3):
        read(model, attached(model), ids_of(60), press)
    assert searches == [model]


def test_one_press_knows_the_heads_of_each_model_of_a_kind(tmp_path: Path) -> None:
    """Two models of one shape: the scores of the first do not speak of the second."""
    press = DuoPress(0.4, recent_tokens=8)
    for name, rows in (("a", SCORES.layers), ("b", {0: (0.1, 0.5), 1: (0.9, 0.2), 2: (0.4, 0.3)})):
        (tmp_path / name).mkdir()
        (tmp_path / name / duo.FILE_NAME).write_text(json.dumps(HeadScores(rows, "qwen3_moe").to_dict()))
    kept = []
    for name in ("a", "b", "a"):
        model = saved_model(tmp_path / name)
        kept.append(torch.cat(held_by(read(model, attached(model), ids_of(120), press))).sum(dim=-1).tolist())
    assert kept[0] == kept[2] == [[120, 12], [12, 120], [12, 120]]
    assert kept[1] == [[12, 120], [120, 12], [120, 12]]


@pytest.mark.parametrize(
    ("layers", "model_type"),
    [
        ({0: (0.5, 0.1), 1: (0.2, 0.9)}, "qwen3_moe"),
        ({0: (0.5, 0.1), 1: (0.2, 0.9), 2: (0.3, 0.4), 3: (0.3, 0.4)}, "qwen3_moe"),
        ({0: (0.5,), 1: (0.2,), 2: (0.3,)}, "qwen3_moe"),
        (SCORES.layers, "mixtral"),
    ],
)
def test_scores_of_another_model_are_refused(tmp_path: Path, layers: Any, model_type: str) -> None:
    file = scores_file(tmp_path, HeadScores(layers, model_type))
    heads = len(layers[0])
    shape = f"{len(layers)} x {heads}"
    with pytest.raises(ValueError, match=rf"{model_type} model with {shape} .* Qwen3MoeForCausalLM has 3 x 2"):
        read(shared_model(), attached(shared_model()), ids_of(60), DuoPress(0.5, head_scores=file))


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "\x00", '{"layers": [1], "model_type": "a"}', '{"layers": {"a": [1]}, "model_type": ""}']
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "scores.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"scores\.json holds no head scores"):
        read(shared_model(), attached(shared_model()), ids_of(60), DuoPress(0.5, head_scores=file))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "deepseek_v3", "mixtral", "dbrx", "llama4"])
def test_heads_of_every_family_are_found_and_fit(family: str) -> None:
    model = FAMILIES[family].build()
    scores = find_head_scores(model, samples=1, tokens=64)
    assert scores.fits(model)
    full = [index for index, layer in enumerate(DynamicCache(config=model.config).layers) if not layer.is_sliding]
    assert sorted(scores.layers) == full
    assert all(0 <= score <= 1 for row in scores.layers.values() for score in row)


def test_a_search_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["qwen3_moe"].build()
    before = [set(vars(module)) for module in model.modules()]
    first = find_head_scores(model, samples=2, tokens=64)
    assert model.config._attn_implementation == "sdpa"
    # kvpress's wrapper of attention functions sets one of these in any forward pass.
    left = {"_pikv_attachment", "masked_key_indices"}
    assert [set(vars(module)) - left for module in model.modules()] == before
    assert find_head_scores(model, samples=2, tokens=64) == first
    assert find_head_scores(model, samples=2, tokens=64, seed=1) != first


def test_heads_that_look_things_up_score_highest_on_the_bundled_model(reference_model: tuple[Any, Any]) -> None:
    """Its first layer sees only single tokens; it is from the second on that heads can follow a repeated text."""
    scores = find_head_scores(reference_model[0], samples=4, tokens=512)
    best = [(layer, head) for _, layer, head in reversed(scores.flat())]
    assert best[0][0] == 1
    assert {layer for layer, _ in best[:3]} & {1}
    assert {layer for layer, _ in best[-4:]} == {0}
    assert scores.flat()[-1][0] > 10 * scores.flat()[0][0]


def test_a_head_built_to_repeat_scores_one() -> None:
    """A model of one layer whose second KV head matches equal tokens; the first attends to all alike."""
    vocab = 256
    options = {"hidden_size": vocab, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": vocab}
    model = FAMILIES["llama"].build(vocab_size=vocab, num_hidden_layers=1, rope_parameters=NO_ROTATION, **options)
    attention, norm = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm
    with torch.no_grad():
        # One channel per token.
        model.model.embed_tokens.weight.copy_(torch.eye(vocab))
        norm.weight.fill_(1)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
            projection.weight[vocab:].copy_(torch.eye(vocab))
    [(plain, looks_back)] = find_head_scores(model, samples=2, tokens=128).layers.values()
    # Passkeys repeat tokens of the rest by chance, and a token sees itself too: half is what is left at least.
    assert looks_back > 0.3
    assert plain == pytest.approx(16 / 128, rel=0.1)
