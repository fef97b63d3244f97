"""Scores of `QueryAwarePress` against the weights that eager attention computes, family by family."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from kvpress import SnapKVPress
from press_runs import attached, ids_of, padded, read, shared_model
from transformers import DynamicCache

from pikv_hf.allocation.observed_queries import Observer
from pikv_hf.presses import PiKVPress, QueryAwarePress
from pikv_hf.presses import pikv_press as pikv
from pikv_hf.presses.query_aware_press import by_page

WINDOW, TOKENS = 12, 70
CHECKED = [
    "qwen3_moe",
    "olmoe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "mixtral",
    "phimoe",
    "granitemoe",
    "glm4_moe",
    "minimax_m2",
    "llama",
]


class Recorded(QueryAwarePress):
    """Notes utilities and scores by layer; removes nothing."""

    def press_layer(self, view: Any, kwargs: dict[str, Any]) -> None:
        if not hasattr(self, "scores"):
            self.scores, self.utilities = {}, {}
        self.scores[view.index] = self.token_scores(view, kwargs)
        self.utilities[view.index] = self.utility(view.module, view.keys, view.values, {"pikv_stored": view.stored})[0]


def recorded(model: Any, cache: Any, ids: torch.Tensor, mask: Any = None, **options: Any) -> Recorded:
    plain: dict[str, Any] = {"window": WINDOW, "pooling": 1, "value_norm": False}
    press = Recorded(0.5, **{**plain, **options})
    read(model, cache, ids, press, mask)
    return press


def eager_weights(family: str, ids: torch.Tensor, mask: Any = None) -> tuple[torch.Tensor, ...]:
    """Return the attention weights of each layer, `(B, Hq, T, T)`."""
    model = FAMILIES[family].build()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model.model(ids, attention_mask=mask, output_attentions=True).attentions


def mean_weights(weights: torch.Tensor, heads: int, window: int) -> torch.Tensor:
    """Return `(B, H, T)`: for each key the mean of the last queries that see it, over the query heads of a KV head."""
    tokens = weights.shape[-1]
    latest = weights[:, :, -window:]
    queries = torch.arange(tokens - latest.shape[2], tokens)
    seeing = (torch.arange(tokens) <= queries[:, None]).sum(dim=0)
    return latest.unflatten(1, (heads, -1)).mean(dim=2).sum(dim=2) / seeing


@pytest.mark.parametrize("family", CHECKED)
@pytest.mark.parametrize("kind", ["pikv", "dynamic"])
def test_scores_are_the_weights_of_eager_attention(family: str, kind: str) -> None:
    model, ids = FAMILIES[family].build(), ids_of(TOKENS, batch=2)
    cache = attached(model) if kind == "pikv" else DynamicCache(config=model.config)
    press = recorded(model, cache, ids)
    weights = eager_weights(family, ids)
    full = [index for index, layer in enumerate(DynamicCache(config=model.config).layers) if not layer.is_sliding]
    assert sorted(press.scores) == full
    for index in full:
        scores = press.scores[index]
        expected = mean_weights(weights[index], scores.shape[1], WINDOW)
        torch.testing.assert_close(press.utilities[index], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(scores[..., :-WINDOW], expected[..., :-WINDOW], atol=1e-5, rtol=0)
        # The latest come first, the newest before all.
        assert (
            scores.argsort(dim=-1, descending=True)[..., :WINDOW].tolist()
            == [[list(range(TOKENS - 1, TOKENS - WINDOW - 1, -1))] * scores.shape[1]] * 2
        )


def test_the_norms_of_the_tested_models_matter() -> None:
    """Otherwise the tests above could not tell observed queries from recomputed ones."""
    attention = shared_model("qwen3_moe").model.layers[0].self_attn
    for norm in (attention.q_norm, attention.k_norm):
        assert (norm.weight - 1).abs().max() > 0.1


class Snap(SnapKVPress):
    """Notes the scores of kvpress's SnapKV; removes nothing."""

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if not hasattr(self, "scores"):
            self.scores = []
        self.scores.append(self.score(module, hidden_states, keys, values, attentions, kwargs)[..., :-WINDOW])
        return keys, values


@pytest.mark.parametrize(("family", "agrees"), [("mixtral", True), ("llama", True), ("qwen3_moe", False)])
def test_kvpress_recomputes_queries_without_the_norms_of_qwen3_moe(family: str, agrees: bool) -> None:
    model, ids = FAMILIES[family].build(), ids_of(TOKENS)
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "q_norm"):
            # As uneven as those of trained models.
            torch.nn.init.uniform_(layer.self_attn.q_norm.weight, 0, 6)
    snap = Snap(0.5, window_size=WINDOW, kernel_size=1)
    read(model, DynamicCache(), ids, snap)
    ours = recorded(model, DynamicCache(), ids).scores
    overlaps = []
    for index, theirs in enumerate(snap.scores):
        mine = ours[index][..., :-WINDOW]
        if agrees:
            torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=0)
        best = [part.topk(15, dim=-1).indices for part in (theirs, mine)]
        overlaps.append((best[0].unsqueeze(-1) == best[1].unsqueeze(-2)).any(dim=-1).float().mean())
    overlap = float(torch.stack(overlaps).mean())
    assert overlap == 1 if agrees else overlap < 0.8


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v2"])
def test_padding_is_neither_scored_nor_counted(family: str) -> None:
    model = shared_model(family)
    rows, ids, mask = padded([40, TOKENS])
    together = recorded(model, attached(model), ids, mask, pooling=5, value_norm=True, page_size=6)
    for number, row in enumerate(rows):
        alone = recorded(model, attached(model), row, pooling=5, value_norm=True, page_size=6)
        for index, scores in alone.scores.items():
            mine = together.scores[index][number : number + 1, :, -row.shape[1] :]
            torch.testing.assert_close(mine[..., :-WINDOW], scores[..., :-WINDOW], atol=1e-5, rtol=1e-4)


def test_a_prompt_in_two_parts_is_scored_as_a_whole() -> None:
    model, ids = shared_model(), ids_of(TOKENS)
    whole = recorded(model, attached(model), ids)
    cache = attached(model)
    press = recorded(model, cache, ids[:, :50])
    read(model, cache, ids[:, 50:], press)
    for index, scores in whole.scores.items():
        torch.testing.assert_close(press.scores[index][..., :-WINDOW], scores[..., :-WINDOW], atol=1e-5, rtol=1e-4)


def test_value_norm_and_pooling_are_what_they_say() -> None:
    model, ids = shared_model(), ids_of(TOKENS)
    dynamic = read(model, DynamicCache(), ids)
    plain = recorded(model, DynamicCache(), ids).utilities[1]
    pooled = recorded(model, DynamicCache(), ids, pooling=3).utilities[1]
    sides = torch.nn.functional.pad(plain, (1, 1))
    torch.testing.assert_close(pooled, (sides[..., :-2] + plain + sides[..., 2:]) / 3)
    weighed = recorded(model, DynamicCache(), ids, value_norm=True).utilities[1]
    torch.testing.assert_close(weighed, plain * dynamic.layers[1].values.norm(dim=-1))


def test_pages_begin_at_the_first_token_of_a_row() -> None:
    scores = torch.tensor([[[9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0]], [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]]])
    held = torch.tensor([[[False, False, True, True, True, True, True]], [[True, True, False, True, True, True, True]]])
    paged = by_page(scores, 3, held)
    assert paged[0, 0, 2:].tolist() == [2, 2, 2, 4.5, 4.5]
    assert paged[1, 0].tolist() == [1.5, 1.5, 1.5, 5, 5, 5, 7]


def test_page_wise_eviction_keeps_whole_pages() -> None:
    model, ids = shared_model(), ids_of(96)
    cache = attached(model)
    read(model, cache, ids, QueryAwarePress(0.5, window=8, page_size=8, sink_tokens=8))
    for layer in cache.layers:
        pages = layer.stored_mask().unflatten(-1, (-1, 8))
        assert (pages.all(dim=-1) == pages.any(dim=-1)).all()
        assert pages.all(dim=-1).sum(dim=-1).tolist() == [[6, 6]]


def test_layers_of_which_recall_is_not_known_are_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pikv.logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    model, ids = FAMILIES["qwen3_moe"].build(), ids_of(64)
    read(model, attached(model), ids, PiKVPress(0.5))
    assert "would be recalled" not in caplog.text
    known = Observer.recall_of
    layer = model.model.layers[1].self_attn

    def recall_of(self: Observer, keys: torch.Tensor) -> torch.Tensor | None:
        return None if self is Observer.of(layer) else known(self, keys)

    monkeypatch.setattr(Observer, "recall_of", recall_of)
    read(model, attached(model), ids, PiKVPress(0.5))
    assert "not known of Qwen3MoeAttention in layers 1;" in caplog.text
