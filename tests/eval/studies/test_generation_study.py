"""Losses under budgets, token by token, on a small random model: the full cache's where the budget holds everything."""

import pytest
import torch
from families import FAMILIES

from pikv_hf.eval.studies.scheduling import generation_study as study

STEPS = 128


@pytest.fixture(scope="module")
def read():
    model = FAMILIES["llama"].build(max_position_embeddings=1024)
    ids = torch.randint(3, 190, (2, study.PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    return model, ids, study.measured(model, ids, study.WAYS["full"], 0)


def test_the_full_cache_is_one_forward(read) -> None:
    model, ids, full = read
    with torch.no_grad():
        logits = model(ids).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, study.PROMPT - 1 : -1].mT, ids[:, study.PROMPT :], reduction="none"
    )
    expected = losses.unflatten(1, (-1, study.EVERY)).mean(2).T
    torch.testing.assert_close(torch.tensor(full["blocks"]), expected)


@pytest.mark.parametrize("way", study.WAYS)
def test_a_budget_for_everything_loses_nothing_and_a_small_one_holds(way: str, read) -> None:
    model, ids, full = read
    whole = study.measured(model, ids, study.WAYS[way], 2 * ids.shape[1])
    torch.testing.assert_close(torch.tensor(whole["blocks"]), torch.tensor(full["blocks"]), rtol=1e-4, atol=1e-4)
    if way == "full":
        return
    budget = study.PROMPT // 2
    part = study.measured(model, ids, study.WAYS[way], budget)
    rows = study.rows_of({"full": full, way: part}, ["a", "b"], budget, full["nbytes"] // ids.numel())
    # Tables, and pages that are not full, come on top of a budget in tokens; `DecodingPress` leaves prompts alone.
    assert rows[2]["held"] <= (0.85 if "Decoding" in way else 1.5 * budget / ids.shape[1])
    assert [row["text"] for row in rows] == ["a", "b"] * 2
    assert rows[0]["nats"] == pytest.approx(torch.tensor(full["blocks"])[:, 0].mean().item())
    assert rows[2]["minus_full"] == pytest.approx(rows[2]["nats"] - rows[0]["nats"])
