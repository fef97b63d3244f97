"""Tokens sit in the shard of the expert that the model's own router chose."""

from typing import Any

import pytest
import torch
from families import FAMILIES, prompts
from torch import nn

from pikv_hf import PiKVCache, attach
from pikv_hf.integration.expert_router import experts_from_output, primary_experts
from pikv_hf.layer.layer import PiKVLayer

ROUTED = [name for name, family in FAMILIES.items() if family.routed]


@pytest.mark.parametrize("name", ROUTED)
def test_shards_follow_the_router(name: str) -> None:
    model = FAMILIES[name].build()
    inputs = prompts(batch=2, length=60)
    cache = PiKVCache.for_model(
        model, page_size=8, recent_window=8, sink_tokens=0, num_shards=8, sliding_layers="paged"
    )
    chosen: dict[int, torch.Tensor] = {}

    def spy(index: int) -> Any:
        # The ids as the experts of the feed-forward receive them, or the router's own scores.
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            ids = next(a for a in [*args, *kwargs.values()] if torch.is_tensor(a) and not a.is_floating_point())
            weights = [a for a in [*args, *kwargs.values()] if torch.is_tensor(a) and a.shape == ids.shape][-1]
            chosen[index] = torch.stack([row[w.argmax()] for row, w in zip(ids, weights, strict=True)])

        return hook

    for index, router in cache.attachment.expert_routers.items():
        if router.reads_inputs:
            router.module.register_forward_pre_hook(spy(index), with_kwargs=True)
        else:
            weight = next(p for p in router.module.parameters() if p.ndim == 2 and p.shape[0] == 8)
            router.module.register_forward_pre_hook(
                lambda m, a, i=index, w=weight: chosen.update(
                    {i: (a[0].flatten(0, -2).float() @ w.T.float()).argmax(-1)}
                )
            )
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    checked = 0
    for index in cache.attachment.expert_routers:
        experts = chosen[index].view(2, -1)
        pool, rows = cache.layers[index].table.plain, cache.layers[index].table.rows
        for row, sequence in enumerate(rows):
            for page in sequence.pages():
                for slot in range(pool.count[page]):
                    expert = int(experts[row, pool.positions[page, slot]])
                    assert int(pool.experts[page, slot]) == expert
                    if pool.shard[page] >= 0:
                        assert pool.shard[page] == expert
                        checked += 1
    assert checked > 40, "hardly any token has left the window"


def test_decoded_tokens_get_their_experts() -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, page_size=4, recent_window=8)
    model.generate(**prompts(batch=2, length=30), past_key_values=cache, max_new_tokens=40, do_sample=False)
    for layer in cache.layers:
        pages = layer.table.distinct_pages()
        held = layer.table.plain.positions[pages] >= 0
        assert (layer.table.plain.experts[pages][held] >= 0).all()
        assert sum(cache.memory_report().layers[layer.layer_idx].shard_tokens) > 60


def test_layers_without_a_router_hash_positions() -> None:
    model = FAMILIES["deepseek_v3"].build()
    cache = PiKVCache.for_model(model, page_size=8, recent_window=8, num_shards=3)
    with torch.no_grad():
        model(**prompts(batch=1, length=100), past_key_values=cache)
    dense, routed = cache.layers[0], cache.layers[1]
    assert not dense.has_expert_router
    assert routed.has_expert_router
    pool = dense.table.plain
    for page in dense.table.distinct_pages():
        if pool.shard[page] >= 0:
            assert (pool.positions[page][: pool.count[page]] // 8 % 3 == pool.shard[page]).all()


@pytest.mark.parametrize("name", ["llama"])
def test_models_without_routers_name_what_was_seen(name: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(ValueError, match=r"no router found in LlamaForCausalLM.*LlamaMLP.*placement=\"hash\""):
        attach(model)
    with pytest.raises(ValueError, match="no router found"):
        PiKVCache.for_model(model)
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(PiKVCache.for_model(model, placement="hash").layers[0], PiKVLayer)


def test_primary_expert_has_the_largest_weight() -> None:
    ids = torch.tensor([[3, 1], [0, 2]])
    assert primary_experts(ids, torch.tensor([[0.4, 0.6], [0.9, 0.1]])).tolist() == [1, 0]
    over_all = torch.tensor([[0.0, 0.6, 0.0, 0.4], [0.1, 0.0, 0.9, 0.0]])
    assert primary_experts(ids, over_all).tolist() == [1, 2]
    assert primary_experts(ids, None).tolist() == [3, 0]


def test_router_outputs_are_read_by_structure() -> None:
    logits = torch.tensor([[[0.1, 0.9, 0.0], [2.0, 1.0, 0.0]]])
    assert experts_from_output((torch.zeros(2, 2), logits), 3).tolist() == [1, 0]
    with pytest.raises(RuntimeError, match=r"last size of 4 experts, got \[\(1, 2, 3\)\]"):
        experts_from_output(logits, 4)
