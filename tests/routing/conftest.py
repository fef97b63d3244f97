"""Fixtures of the tests of routing."""

from typing import Any

import pytest

import pikv_hf.attention.paged_attention
import pikv_hf.integration.attention_function
from pikv_hf.attention.routed_attention import attend_choice


@pytest.fixture
def routed_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the columns chosen in each routed step of a layer."""
    steps: list[int] = []

    def counting(index: Any, choice: Any, *rest: Any, **more: Any) -> Any:
        steps.append(choice.columns.shape[2])
        return attend_choice(index, choice, *rest, **more)

    monkeypatch.setattr(pikv_hf.attention.paged_attention, "attend_choice", counting)
    return steps
