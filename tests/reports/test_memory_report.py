"""What a memory report prints: whole tables in 80 columns, and no column that says the same in every row."""

from typing import Any

import pytest
from families import FAMILIES, prompts

from pikv_hf import PiKVCache
from pikv_hf.reports.memory_report import LayerMemory, MemoryReport

GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def header(text: str) -> list[str]:
    """Return the columns of the first table."""
    return next(line for line in text.splitlines() if line.startswith(" layer")).split()


@pytest.mark.parametrize(
    ("family", "options", "columns"),
    [
        ("qwen3_moe", {}, ["layer", "tokens"]),
        ("qwen3_moe", {"devices": ["cpu:0", "cpu:1"]}, ["layer", "device", "tokens"]),
        ("gpt_oss", {"key_codec": "int4", "value_codec": "int4"}, ["layer", "tokens"]),
    ],
)
def test_it_fits_80_columns(family: str, options: dict[str, Any], columns: list[str]) -> None:
    model = FAMILIES[family].build()
    cache = PiKVCache.for_model(model, page_size=8, recent_window=16, **options)
    model.generate(**prompts(2, 1200), past_key_values=cache, **GREEDY)
    text = str(cache.memory_report())
    assert max(map(len, text.splitlines())) <= 80
    assert header(text) == [*columns, "window", "shards", "free", "metadata", "total"]
    assert ("on cpu, 1,202 tokens seen" in text) == ("devices" not in options)
    assert ("sliding" in text) == (family == "gpt_oss")
    for layer in cache.memory_report().layers:
        assert f" {layer.tokens_stored:,} " in text


def test_states_have_a_column_where_there_are_any() -> None:
    layers = LayerMemory(0, "state", "cpu", state=2048, total=2048), LayerMemory(1, "paged", "cpu", keys=512, total=512)
    text = str(MemoryReport(2560, layers))
    assert header(text)[-2:] == ["state", "total"]
    assert "\n 0 state " in text
    assert "K 512 B, V 0 B, metadata 0 B, states 2.0 KiB." in text


def test_large_amounts_fit_too() -> None:
    size = 1000 * 2**20
    layers = tuple(
        LayerMemory(index, "paged", "cuda:0", size, size, size, 0, size, size, size, 0, (size,), (7,), 1 << 20, 8 << 20)
        for index in range(2)
    )
    text = str(MemoryReport(2 * size, layers))
    assert header(text)[0] == "layer"
    assert max(map(len, text.splitlines())) <= 80
