"""kvpress's presses see the names that they were written for, and their classes are as before when asked for."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import kvpress
import pytest
import torch
from press_runs import attached, ids_of, read, shared_model
from transformers import DynamicCache

from pikv_hf.common.transformers_release import CACHE_ARGUMENT, arguments_of_layers, cache_argument
from pikv_hf.presses import PiKVPress, RowwisePress, kvpress_adapter


@pytest.fixture
def installed() -> Iterator[None]:
    """Tests leave it as the import of pikv_hf.presses did."""
    yield
    kvpress_adapter.install()


@dataclass
class Spy(kvpress.ScorerPress):
    """A user's press, made when the adapter was there already; scores by position and notes what it is given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.positions: list[list[int]] = []

    def forward_hook(self, module: Any, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
        assert kwargs["past_key_values"].layers[module.layer_idx].get_seq_length() >= 1
        self.positions.append(kwargs["cache_position"].tolist())
        return super().forward_hook(module, input, kwargs, output)

    def score(self, module: Any, hidden: Any, keys: torch.Tensor, values: Any, attentions: Any, kwargs: Any) -> Any:
        return torch.arange(keys.shape[2]).expand(keys.shape[:3]).float()


def test_it_is_installed_where_it_is_needed_and_only_there() -> None:
    named = {"past_key_values", "cache_position"} <= arguments_of_layers()
    assert kvpress_adapter.is_needed() is not named
    assert kvpress_adapter.is_installed() is not named


def test_presses_of_this_project_are_kvpress_own() -> None:
    assert isinstance(PiKVPress(0.5), kvpress.ScorerPress)
    assert isinstance(RowwisePress(kvpress.KnormPress(0.5)), kvpress.BasePress)


@pytest.mark.parametrize("make", [lambda model: DynamicCache(), attached], ids=["dynamic", "pikv"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_hooks_are_given_the_positions_of_a_model_of_5_2(make: Any, wrapped: bool) -> None:
    model, press = shared_model(), Spy(0.5)
    cache = make(model)
    outer = kvpress.ComposedPress([kvpress.KnormPress(0.25), press]) if wrapped else press
    left = 30 if wrapped else 40
    with torch.no_grad(), outer(model):
        for new in (80, 3, 1):
            model(ids_of(new), **cache_argument(cache))
    first = [list(range(80))] * 3
    # On a PiKVCache the model goes on where the text is, on another where the cache ends.
    seen = cache.get_seq_length() - 4
    assert seen == (80 if make is attached else left)
    assert press.positions == first + [list(range(seen, seen + 3))] * 3 + [[seen + 3]] * 3
    assert [layer.get_seq_length() for layer in cache.layers] == [left + 4] * 3


def test_a_layer_that_lost_all_its_tokens_is_not_taken_for_a_new_one() -> None:
    model = shared_model()
    # kvpress keeps nothing of a layer at a ratio of 1.
    press = kvpress.PerLayerCompressionPress(Spy(), [0.5, 1.0, 0.5])
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(ids_of(80), **cache_argument(cache))
        assert [layer.get_seq_length() for layer in cache.layers] == [40, 0, 40]
        model.model(ids_of(1), **cache_argument(cache), position_ids=torch.tensor([[80]]))
    assert [layer.get_seq_length() for layer in cache.layers] == [41, 1, 41]


def test_a_call_that_fails_leaves_nothing_noted() -> None:
    model, cache = shared_model(), DynamicCache()
    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="on purpose"):
        read(model, cache, ids_of(20), kvpress.KnormPress(0.5))
    handle.remove()
    assert not kvpress_adapter._running.calls


def fail(*_: Any) -> None:
    raise KeyError("on purpose")


@pytest.mark.skipif(not kvpress_adapter.is_needed(), reason="kvpress works by itself with this release")
@pytest.mark.usefixtures("installed")
def test_it_is_undone_on_request() -> None:
    model = shared_model()
    adapted = {kind: dict(vars(kind)) for kind in kvpress_adapter._with_subclasses(kvpress.BasePress)}
    kvpress_adapter.remove()
    assert not kvpress_adapter.is_installed()
    assert "__init_subclass__" not in vars(kvpress.BasePress)
    with pytest.raises(KeyError, match="past_key_values"):
        read(model, DynamicCache(), ids_of(20), kvpress.KnormPress(0.5))
    # Presses of this project need none.
    assert read(model, attached(model), ids_of(20), PiKVPress(0.5)).get_seq_length() == 20
    kvpress_adapter.install()
    kvpress_adapter.install()
    assert all(set(vars(kind)) >= set(before) for kind, before in adapted.items())
    assert read(model, DynamicCache(), ids_of(20), kvpress.KnormPress(0.5)).get_seq_length() == 10


def test_blocks_of_kvpress_bring_no_warning_of_old_names() -> None:
    model, cache = shared_model(), DynamicCache()
    with warnings.catch_warnings(), torch.no_grad(), kvpress.KnormPress(0.5)(model):
        warnings.simplefilter("error", FutureWarning)
        model.model(ids_of(20), **{CACHE_ARGUMENT: cache})
    assert cache.get_seq_length() == 10
