"""Reading ahead: what one layer's hidden states say about the next layer's query, and that nothing depends on it."""

from typing import Any

import pytest
import torch
from families import FAMILIES, prompts

from pikv_hf import PiKVCache
from pikv_hf.common.foreign_attributes import OBSERVER_ATTRIBUTE
from pikv_hf.integration.prefetch import predicted_query

OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 4}
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "minimax_m2", "glm4_moe", "gpt_oss"])
def test_the_prediction_from_a_layers_own_input_is_its_query(family: str) -> None:
    """Given what really goes into a layer's attention, the prediction is the query that the layer makes of it."""
    model = FAMILIES[family].build()
    attention = model.model.layers[1].self_attn
    seen: dict[str, Any] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, args=args)

    handle = attention.register_forward_pre_hook(note, with_kwargs=True)
    queries: list[torch.Tensor] = []
    setattr(attention, OBSERVER_ATTRIBUTE, lambda call: queries.append(call.query.clone()))
    inputs = prompts(1, 20)
    cache = PiKVCache.for_model(model, **OPTIONS)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        model(inputs["input_ids"][:, :1], past_key_values=cache)
    handle.remove()
    delattr(attention, OBSERVER_ATTRIBUTE)
    hidden = seen.get("hidden_states", seen["args"][0] if seen["args"] else None)
    predicted = predicted_query(attention, hidden, seen["position_embeddings"])
    assert predicted is not None
    assert torch.allclose(predicted, queries[-1][:, :, 0], atol=1e-5)


def test_no_guess_for_an_unknown_projection() -> None:
    model = FAMILIES["deepseek_v3"].build()
    attention = model.model.layers[1].self_attn
    cos = torch.ones(1, 1, 8)
    assert predicted_query(attention, torch.ones(1, 1, 64), None) is None
    query = predicted_query(attention, torch.ones(1, 1, 64), (cos, cos))
    # Multi-head latent attention splits its query before it rotates a part: what comes of it is no query, or none.
    assert query is None or query.shape[1] != attention.num_heads


@pytest.mark.parametrize("guess", ["as it is", "nonsense", "error"])
def test_guesses_change_no_token(guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["qwen3_moe"].build()
    inputs = prompts(2, 200)
    routed: dict[str, Any] = {**OPTIONS, "routing": "page_bound", "max_pages": 6}
    plain = model.generate(**inputs, past_key_values=PiKVCache.for_model(model, **routed), **GREEDY)

    def replaced(attention: Any, hidden: torch.Tensor, rotation: Any) -> torch.Tensor:
        if guess == "error":
            raise RuntimeError("no guess")
        return torch.randn(hidden.shape[0], attention.config.num_attention_heads, attention.head_dim)

    if guess == "nonsense":
        monkeypatch.setattr("pikv_hf.integration.prefetch.predicted_query", replaced)
    elif guess == "error":
        monkeypatch.setattr("pikv_hf.integration.prefetch._normed", replaced)
    cache = PiKVCache.for_model(model, **routed, tiers={"cpu": "48KiB", "disk": None})
    tiered = model.generate(**inputs, past_key_values=cache, **GREEDY)
    assert torch.equal(tiered, plain)
    ahead = cache.stats().to_dict()["tiers"]["prefetches"]
    assert (ahead["issued"] > 0) == (guess != "error")
    assert ahead["used"] + ahead["wasted"] <= ahead["issued"]


def test_an_exactly_read_cache_reads_nothing_ahead_by_guesses() -> None:
    model = FAMILIES["qwen3_moe"].build()
    cache = PiKVCache.for_model(model, **OPTIONS)
    model.generate(**prompts(1, 100), past_key_values=cache, **GREEDY)
    stats = cache.stats()
    assert stats.tiers is None
    assert stats.routed_steps == stats.pages_held == stats.pages_evicted == 0
    assert stats.read_share is None
