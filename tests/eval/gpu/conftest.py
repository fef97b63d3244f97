"""Fixtures of the tests of the GPU check."""

import pytest
from tiny_gpu_check import in_single

from pikv_hf.eval.gpu import attention_speed, check_attention, page_lists


@pytest.fixture
def single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch attend in float32, whatever the dtype of a case."""
    monkeypatch.setattr(check_attention, "paged_decode_attention", in_single)
    monkeypatch.setattr(page_lists, "paged_decode_attention", in_single)
    monkeypatch.setattr(attention_speed, "paged_decode_attention", in_single)
