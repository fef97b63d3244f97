"""Presses of kvpress keep with every release of transformers what they keep with the one that they were made for."""

import json
from typing import Any

import pytest
import torch
from kvpress_cases import ARCHITECTURES, CASES, PressCase
from kvpress_golden import FILE, kept_by

pytestmark = pytest.mark.slow

GOLDEN: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
#: Near ties may turn out otherwise on another processor: tokens of a lane that one of them costs.
ONE_SWAP = 2


def test_every_press_is_in_the_file() -> None:
    assert set(GOLDEN) == {f"{case.id} {name}" for case in CASES for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_the_same_tokens_are_kept(architecture: str, case: PressCase) -> None:
    golden, found = GOLDEN[f"{case.id} {architecture}"], kept_by(architecture, case)
    assert found["lengths"] == golden["lengths"]
    if golden["kept"] is not None:
        for layer, expected in zip(found["kept"], golden["kept"], strict=True):
            for head, wanted in zip(layer, expected, strict=True):
                assert (int(head, 16) ^ int(wanted, 16)).bit_count() <= ONE_SWAP
    if found["kept"] == golden["kept"]:
        logits, expected = torch.tensor(found["logits"]), torch.tensor(golden["logits"])
        # The tolerance of kvpress_runs.assert_close, and the rounding of the file.
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * golden["largest"] + 1e-5)
