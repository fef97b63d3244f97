"""Layers with states: a context goes on where a state was kept, with the tokens of a model without a store."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache

from pikv_hf import ContextStore
from pikv_hf.eval.studies.models.tiny_models import VOCAB, tiny_model

OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
#: By model type: options that give a layer of each kind, and where tokens are placed by.
HYBRIDS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_next": ({"num_hidden_layers": 5}, "expert"),
    "lfm2_moe": ({}, "expert"),
    "granitemoehybrid": ({"layer_types": ["attention", "mamba", "attention"]}, "expert"),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, "hash"),
    "olmo_hybrid": ({"num_hidden_layers": 5}, "hash"),
}
pytestmark = pytest.mark.skipif(
    not hasattr(Cache, "update_recurrent_state"), reason="this transformers' caches hold no states"
)


@functools.cache
def model_of(name: str) -> Any:
    return tiny_model(name, **HYBRIDS[name][0])


def ids(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", HYBRIDS)
def test_contexts_go_on_at_checkpoints(name: str, tmp_path: Path) -> None:
    model, placement = model_of(name), HYBRIDS[name][1]
    first, second, other = ids(40, 1), ids(30, 2), ids(30, 3)
    prompts = [torch.cat(parts, dim=1) for parts in ((first, second), (first, other), (first, second, other))]
    expected = [model.generate(prompt, **GREEDY) for prompt in prompts]
    reused = []
    for _ in range(2):
        store = ContextStore(model, path=tmp_path, checkpoint_every=16, placement=placement, **OPTIONS)
        for prompt, tokens in zip(prompts, expected, strict=True):
            before = store.stats().tokens_reused
            assert torch.equal(store.generate(prompt, **GREEDY), tokens)
            reused.append(store.stats().tokens_reused - before)
    # Of the second prompt 40 tokens are known, and the states behind 32 of them.
    assert reused == [0, 32, 69, 69, 69, 99]


def test_a_model_that_begins_anew_is_refused() -> None:
    """Jamba's scan of several tokens does not look at the state before them."""
    with pytest.raises(ValueError, match="does not go on from its states"):
        ContextStore(tiny_model("jamba", num_hidden_layers=4))
