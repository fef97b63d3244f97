"""`ExpertPress`: importance by hand, whose routing it is, and the control."""

from typing import Any

import pytest
import torch
from families import FAMILIES
from press_runs import attached, held_by, ids_of, padded, read, shared_model
from transformers import DynamicCache

from pikv_hf.integration.attachment import attach
from pikv_hf.presses import ExpertPress, PyramidPress, QueryAwarePress
from pikv_hf.presses.expert_press import dealt, expert_importance
from pikv_hf.presses.expert_routing import routing_below, routing_of, unwatch_routers, watch_routers
from pikv_hf.presses.pyramid_press import shards_of, shares

TOKENS = 80


def test_importance_is_the_mean_mass_of_the_tokens_of_an_expert() -> None:
    mass = torch.tensor([[[1.0, 2.0, 6.0, 4.0, 100.0, 9.0]]])
    experts = torch.tensor([[0, 1, 0, 1, 0, 2]])
    counted = torch.tensor([[[True, True, True, True, False, False]]])
    got = expert_importance(mass, experts, 4, counted)
    # Expert 0: (1 + 6) / 2, expert 1: (2 + 4) / 2; of expert 2 nothing counts.
    assert got.tolist() == [[[3.5, 3.0, 3.5, 3.0, 3.5, 0.0]]]


def test_a_loaded_expert_does_not_win_by_its_load() -> None:
    mass = torch.full((1, 2, 12), 0.1)
    experts = torch.tensor([[0] * 11 + [1]])
    got = expert_importance(mass, experts, 2, torch.ones_like(mass, dtype=torch.bool))
    torch.testing.assert_close(got, mass)


def routing_by_hand(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return primary experts and their share of the chosen experts' weight, `(1, T)` each, by layer."""
    outputs: list[Any] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, args, out: outputs.append(out)) for layer in model.model.layers
    ]
    with torch.no_grad():
        model.model(ids)
    for hook in hooks:
        hook.remove()
    found = []
    for _, weights, chosen in outputs:
        best = weights.argmax(dim=-1, keepdim=True)
        share = weights.gather(1, best) / weights.sum(dim=-1, keepdim=True)
        found.append((chosen.gather(1, best).view(1, -1), share.view(1, -1)))
    return found


class Recorded(ExpertPress):
    """Notes the scores, and what they are made of, by layer; removes nothing."""

    def press_layer(self, view: Any, kwargs: dict[str, Any]) -> None:
        if not hasattr(self, "scores"):
            self.scores, self.masses = {}, {}
        self.scores[view.index] = self.token_scores(view, kwargs)
        self.masses[view.index] = self.utility(view.module, view.keys, view.values, {"pikv_stored": view.stored})[0]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_scores_are_mass_and_the_routing_of_the_layer_below(weight: float) -> None:
    model, ids = shared_model(), ids_of(TOKENS)
    routing = routing_by_hand(model, ids)
    assert len({int(expert) for expert in routing[0][0].flatten()}) > 2
    press = Recorded(0.5, window=8, router_weight=weight)
    read(model, attached(model), ids, press)
    for index in range(3):
        mass = press.masses[index]
        expected = mass
        if index:
            experts, confidence = routing[index - 1]
            old = torch.arange(TOKENS) < TOKENS - 8
            importance = torch.zeros_like(mass)
            for head in range(mass.shape[1]):
                for token in range(TOKENS):
                    same = (experts[0] == experts[0, token]) & old
                    importance[0, head, token] = mass[0, head, same].mean() if same.any() else 0
            expected = mass ** (1 - weight) * (importance * confidence) ** weight
        torch.testing.assert_close(press.scores[index][..., :-8], expected[..., :-8], atol=1e-6, rtol=1e-4)
        assert (press.scores[index][..., -8:].amin() > press.scores[index][..., :-8].amax()).all()


def test_routing_alone_and_mass_alone_keep_different_tokens() -> None:
    model, ids = shared_model(), ids_of(TOKENS)
    kept = {
        weight: torch.stack(
            held_by(read(model, attached(model), ids, ExpertPress(0.5, window=8, router_weight=weight)))
        )
        for weight in (0.0, 0.5, 1.0)
    }
    plain = torch.stack(held_by(read(model, attached(model), ids, QueryAwarePress(0.5, window=8))))
    assert torch.equal(kept[0.0], plain)
    assert torch.equal(kept[1.0][0], plain[0])
    for weight in (0.5, 1.0):
        assert not torch.equal(kept[weight][1:], plain[1:])


def test_the_control_depends_on_its_seed_and_not_on_the_router() -> None:
    model, ids = shared_model(), ids_of(TOKENS)

    def kept(**options: Any) -> torch.Tensor:
        return torch.stack(held_by(read(model, attached(model), ids, ExpertPress(0.5, window=8, **options))))

    control = kept(router="random", seed=1)
    torch.manual_seed(99)
    assert torch.equal(kept(router="random", seed=1), control)
    assert not torch.equal(kept(router="random", seed=2), control)
    assert not torch.equal(kept(), control)
    # Nothing is dealt out below the first layer.
    assert torch.equal(kept()[0], control[0])


def test_the_control_deals_each_row_its_own_tokens() -> None:
    real = torch.tensor([[False, False, True, True, True, True], [True, True, True, True, True, True]])
    order = dealt(real, 3)
    assert order[0, :2].tolist() == [0, 1]
    assert sorted(order[0, 2:].tolist()) == [2, 3, 4, 5]
    assert sorted(order[1].tolist()) == list(range(6))
    assert torch.equal(dealt(real[:1, 2:], 3)[0] + 2, order[0, 2:])


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "mixtral", "granitemoe", "glm4_moe", "dbrx"])
def test_routers_of_every_family_are_read(family: str) -> None:
    model, ids = FAMILIES[family].build(), ids_of(TOKENS, batch=2)
    with attach(model), torch.no_grad():
        modules = watch_routers(model)
        model(ids)
        read_layers = [index for index, module in modules.items() if routing_of(module) is not None]
        # The first layers of some families are dense.
        assert read_layers == ([0, 1, 2] if family in ("gpt_oss", "mixtral", "granitemoe", "dbrx") else [1, 2])
        for index in read_layers:
            routing = routing_of(modules[index])
            experts, confidence = routing.rows(2, TOKENS)
            assert (
                0 <= int(experts.min()) <= int(experts.max()) < routing.num_experts == 8 if family != "dbrx" else True
            )
            assert 0 < float(confidence.min()) <= float(confidence.max()) <= 1 + 1e-6
            assert routing.rows(2, TOKENS - 1) is None
        unwatch_routers(modules)
        assert not any("_pikv_rout" in name for module in modules.values() for name in vars(module))


def test_routing_of_an_earlier_prompt_is_not_used() -> None:
    """Two prompts of one length: when the last layer has attended, its router has not run for the second."""
    model = shared_model()
    used: list[Any] = []

    class Noted(PyramidPress):
        def best_of_shards(self, view: Any, *args: Any) -> torch.Tensor:
            used.append(shards_of(view)[0].clone())
            return super().best_of_shards(view, *args)

    press = Noted(0.5, window=8)
    with press(model), torch.no_grad():
        for seed in (1, 2):
            model.model(ids_of(TOKENS, seed=seed), past_key_values=attached(model))
    first, second = used[:3], used[3:]
    assert torch.equal(first[2], second[2])
    assert torch.equal(first[2][0], torch.arange(TOKENS) // 32 % 4)
    alone: list[Any] = []
    used, alone = alone, used
    read(model, attached(model), ids_of(TOKENS, seed=2), press)
    for mine, theirs in zip(second, used, strict=True):
        assert torch.equal(mine, theirs)


def test_shards_get_tokens_by_the_attention_to_them() -> None:
    model = shared_model()
    press = PyramidPress(0.5, window=8, sink_tokens=0, shard_weight=1.0)
    scores = torch.arange(40.0).repeat(1, 2, 1)
    view = type("View", (), {})()
    view.stored = torch.ones(1, 2, 40, dtype=torch.bool)
    view.layer, view.module, view.index = DynamicCache().layers, model.model.layers[0].self_attn, 0
    # 40 tokens are in two shards by position, 32 and 8; all attention is to the first.
    mass = torch.zeros(1, 2, 40)
    mass[..., :32] = 1
    kept = press.best_of_shards(view, scores, mass, [10])
    assert kept.nonzero()[:, 2].tolist() == [*range(22, 32)] * 2
    press.shard_weight = 0.0
    kept = press.best_of_shards(view, scores, mass, [10])
    assert kept.nonzero()[:, 2].tolist() == [*range(24, 32), 38, 39] * 2
    assert shares(torch.zeros(4)).tolist() == [0.25] * 4


def test_padding_has_no_part_in_importance() -> None:
    model = shared_model()
    rows, ids, mask = padded([50, TOKENS])
    together = Recorded(0.5, window=8, router_weight=1.0)
    read(model, attached(model), ids, together, mask)
    for number, row in enumerate(rows):
        alone = Recorded(0.5, window=8, router_weight=1.0)
        read(model, attached(model), row, alone)
        for index, scores in alone.scores.items():
            mine = together.scores[index][number : number + 1, :, -row.shape[1] : -8]
            torch.testing.assert_close(mine, scores[..., :-8], atol=1e-6, rtol=1e-3)


def test_a_dense_first_layer_leaves_the_second_to_its_mass(latent_family: str) -> None:
    model, ids = FAMILIES[latent_family].build(), ids_of(TOKENS)
    press = Recorded(0.5, window=8, router_weight=1.0)
    with press(model), torch.no_grad():
        modules = [layer.self_attn for layer in model.model.layers]
        assert [routing_below(module) is not None for module in modules] == [False, False, True]
        model.model(ids, past_key_values=attached(model))
    for index in (0, 1):
        torch.testing.assert_close(press.scores[index][..., :-8], press.masses[index][..., :-8])
