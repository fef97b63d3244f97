"""Joint decisions where something is missing: queries, room, weights in memory, finite values, an uncompiled model."""

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from budget_runs import check, decode, gave_way, make_cache, paged_layers, shared_model
from families import COMMON, FAMILIES
from press_runs import ids_of, read
from transformers import Gemma2Config, Gemma2ForCausalLM

from pikv_hf import PiKVCache
from pikv_hf.allocation.bit_allocation import BudgetTooSmallError
from pikv_hf.allocation.observed_queries import attention_mass
from pikv_hf.allocation.output_projection import gram_of
from pikv_hf.layer import joint_budget, joint_loss
from pikv_hf.layer.joint_loss import LEAST_RECALLED, _latest_queries
from pikv_hf.presses import PiKVPress
from pikv_hf.scheduling.growth_limit import BudgetError

BUDGETS = [60, 0.3, "110KB"]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("tokens", [5, 60, 150])
def test_tokens_without_queries_are_judged_by_their_values(budget: Any, tokens: int) -> None:
    """They come by `update`, from no attention; then the model generates."""
    model = shared_model()
    cache = make_cache(model, budget=budget)
    for index in range(2):
        cache.update(*torch.randn(2, 2, 2, tokens, 16, generator=torch.Generator().manual_seed(index)), index)
    for token in ids_of(90, batch=2).split(1, dim=1):
        decode(model, cache, token)
        check(cache)
    assert all(map(gave_way, paged_layers(cache)))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_a_budget_holds_by_pages_where_no_widths_can_be_decided(
    budget: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a router that is awaited and without."""

    def refuses(*_: Any, **__: Any) -> None:
        raise BudgetTooSmallError(7, 11)

    monkeypatch.setattr(joint_budget, "token_widths", refuses)
    model = shared_model(family)
    cache = make_cache(model, budget=budget, placement="hash")
    for part in (*ids_of(200).split(70, dim=1), *ids_of(40).split(1, dim=1)):
        with torch.no_grad():
            model(part, past_key_values=cache)
        check(cache)
    assert all(layer.parts[0].scheduler.pages_evicted for layer in paged_layers(cache))


def test_what_cannot_be_kept_names_what_there_is_and_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise BudgetTooSmallError(7, 11)

    model = shared_model()
    cache = make_cache(model, budget=60)
    read(model, cache, ids_of(50))
    before = [(layer.stored_mask(), *layer.dense()) for layer in cache.layers]
    monkeypatch.setattr(joint_budget, "token_widths", refuses)
    # Pages cannot go either.
    monkeypatch.setattr("pikv_hf.scheduling.page_scheduler.evict_packed", lambda *_: 1)
    monkeypatch.setattr("pikv_hf.layer.budget_account.evict_packed", lambda *_: 1)
    with pytest.raises(BudgetError, match=r"budget=60.*a budget of 7 bytes.*take 11 bytes"):
        read(model, cache, ids_of(120))
    cache.crop(50)
    for layer, then in zip(cache.layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(then, (layer.stored_mask(), *layer.dense()), strict=True))


def test_heads_that_overflow_count_like_others() -> None:
    model = FAMILIES["llama"].build(num_hidden_layers=2)

    def overflow(_: Any, __: Any, values: torch.Tensor) -> torch.Tensor:
        values[:, 30, :16] = torch.inf
        return values

    model.model.layers[1].self_attn.v_proj.register_forward_hook(overflow)
    cache = make_cache(model, budget=60, placement="hash")
    read(model, cache, ids_of(200))
    check(cache)
    others = cache.layers[0].stored_mask().sum()
    assert others > cache.layers[0].stored_mask().shape[1] * 60 // 2


def widths_of(cache: PiKVCache) -> list[torch.Tensor]:
    return [torch.cat([layer.stored_mask().flatten(), layer.dense()[0].flatten() != 0]) for layer in cache.layers]


@pytest.mark.parametrize("how", ["inference", "cpu", "disk"])
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_weights_are_measured_wherever_they_are(how: str, family: str, tmp_path: Any) -> None:
    """Made in inference mode, or on the meta device until they are called: the decision is the same."""

    def held(model: Any) -> list[torch.Tensor]:
        cache = make_cache(model, budget=60, placement="hash")
        read(model, cache, ids_of(200))
        decode(model, cache, ids_of(30))
        check(cache)
        return widths_of(cache)

    expected = held(FAMILIES[family].build(num_hidden_layers=2))
    with torch.inference_mode(how == "inference"):
        model = FAMILIES[family].build(num_hidden_layers=2)
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    if how == "disk":
        disk_offload(model, tmp_path, execution_device="cpu")
    assert all(torch.equal(*pair) for pair in zip(held(model), expected, strict=True))


def test_a_weight_that_cannot_be_had_is_said() -> None:
    model = FAMILIES["llama"].build(num_hidden_layers=2)
    attention = model.model.layers[0].self_attn
    heads = attention.o_proj.in_features // attention.head_dim
    attention.o_proj.to("meta")
    with pytest.warns(UserWarning, match="LlamaAttention's output projection is not in memory"):
        gram = gram_of(attention, heads, attention.head_dim)
    assert torch.equal(gram, torch.eye(attention.head_dim).expand(heads, -1, -1))


def test_nothing_is_left_on_modules() -> None:
    model = FAMILIES["llama"].build(num_hidden_layers=2)
    attention = model.model.layers[0].self_attn
    make_cache(model, placement="hash")
    before = set(vars(attention))
    read(model, make_cache(model, budget=60, placement="hash"), ids_of(200))
    # Where kvpress has its head-wise presses put what they mark.
    assert set(vars(attention)) - before <= {"masked_key_indices"}


@pytest.mark.parametrize("press", [False, True])
def test_a_compiled_model_decides_alike(press: bool) -> None:
    """What looks at queries and moves them runs as it is."""
    model = FAMILIES["llama"].build(num_hidden_layers=2)
    ids, logits = ids_of(150), []
    for called in (model, torch.compile(model, backend="eager")):
        cache = make_cache(model, placement="hash", **({} if press else {"budget": 60}))
        with torch.no_grad():
            if press:
                with PiKVPress(compression_ratio=0.7)(model):
                    called(ids, past_key_values=cache)
            else:
                called(ids, past_key_values=cache)
            logits.append(called(ids_of(20), past_key_values=cache).logits)
        assert sum(int((~layer.stored_mask()).sum()) for layer in cache.layers) or cache.layers[0].table.pools.packed
    torch.testing.assert_close(*logits)


def soft_capped() -> Any:
    """Return a small Gemma 2, whose logits are capped."""
    options = {**COMMON, "num_hidden_layers": 2, "head_dim": 16, "attn_logit_softcapping": 2.0, "sliding_window": 24}
    return Gemma2ForCausalLM(Gemma2Config(**options)).eval()


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_remembered_queries_compete_as_they_did(family: str, tmp_path: Any) -> None:
    """With attention sinks and soft caps, also in a saved cache."""
    model = shared_model(family) if family == "gpt_oss" else soft_capped()
    cache = make_cache(model, budget=60, sliding_layers="paged", placement="hash")
    read(model, cache, ids_of(100))
    decode(model, cache, ids_of(9))
    cache.save(tmp_path / "cache")
    for each in (cache, PiKVCache.load(tmp_path / "cache", model)):
        layer = paged_layers(each)[-1]
        judge, stored = _latest_queries(layer.edits), layer.stored_mask()
        module = layer.attachment.attention_of(layer.layer_idx)
        softcap = getattr(model.config, "attn_logit_softcapping", None)
        assert judge.softcap == softcap
        assert judge.recent is not None
        mass = attention_mass(judge, judge.recent, layer.dense()[0], stored, causal=False)
        total = (mass * judge.recent.queries.shape[2]).sum(dim=2)
        if getattr(module, "sinks", None) is None:
            torch.testing.assert_close(total, torch.full_like(total, float(judge.recent.queries.shape[2])))
        else:
            assert torch.equal(judge.sinks, module.sinks)
            assert bool((total < judge.recent.queries.shape[2]).all())


@pytest.mark.parametrize("budget", BUDGETS)
def test_how_well_tokens_would_be_recalled_is_known_from_call_to_call(budget: Any, tmp_path: Any) -> None:
    """Of everything that came in calls of several tokens and is still there, of nothing that was generated."""
    model, chunk = shared_model(), 50
    cache = make_cache(model, budget=budget)
    for part in ids_of(4 * chunk).split(chunk, dim=1):
        read(model, cache, part)
    decode(model, cache, ids_of(12))
    read(model, cache, ids_of(LEAST_RECALLED - 1))
    read(model, cache, ids_of(chunk))
    known = torch.ones(5 * chunk + 11 + LEAST_RECALLED, dtype=torch.bool)
    known[4 * chunk : -chunk] = False
    cache.save(tmp_path / "cache")
    for each in (cache, cache.fork(), PiKVCache.load(tmp_path / "cache", model)):
        for layer in paged_layers(each):
            stored, recall = layer.stored_mask(), layer.parts[0].scheduler.recall
            assert bool(stored.any(dim=(0, 1)).logical_and(known).any())
            assert torch.equal(recall.mass(layer.seen).isnan() | ~stored, ~(stored & known))
    cache.crop(70)
    for layer in paged_layers(cache):
        assert layer.parts[0].scheduler.recall.columns == 70


def test_later_chunks_are_decided_by_recall(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all layers, by a number for every token: losses by other estimates are in another unit."""
    model, known = shared_model("llama"), list[torch.Tensor | None]()
    loss = joint_loss.token_loss

    def noted(observer: Any, gram: Any, keys: torch.Tensor, *more: Any) -> torch.Tensor:
        known.append(observer.recalled if observer.knows_recall_of(keys) else None)
        return loss(observer, gram, keys, *more)

    monkeypatch.setattr(joint_loss, "token_loss", noted)
    cache = make_cache(model, budget=60, placement="hash")
    for part in ids_of(180).split(60, dim=1):
        read(model, cache, part)
    decode(model, cache, ids_of(30))
    assert len(known) >= 2 * 3
    assert all(each is not None and bool(((each >= 0) & (each <= 1)).all()) for each in known)
