"""PiKVConfig validates itself and survives a round trip."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pikv_hf import PiKVConfig


@given(
    page_size=st.integers(1, 4096),
    recent_window=st.integers(0, 10**6),
    sink_tokens=st.integers(0, 10**4),
    num_shards=st.integers(1, 512),
    placement=st.sampled_from([None, "expert", "balanced", "hash"]),
    sliding_layers=st.sampled_from(["bounded", "paged"]),
)
def test_round_trips(**options: Any) -> None:
    config = PiKVConfig(**options)
    assert PiKVConfig.from_dict(config.to_dict()) == config
    assert PiKVConfig.from_json(config.to_json()) == config
    assert hash(PiKVConfig.from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"page_size": 0}, ValueError, "page_size must be at least 1, got 0"),
        ({"page_size": 5000}, ValueError, "at most 4096, got 5000"),
        ({"page_size": 32.0}, TypeError, r"page_size must be an int, got 32.0 \(float\)"),
        ({"num_shards": True}, TypeError, "num_shards must be an int, got True"),
        ({"recent_window": -1}, ValueError, "recent_window must be at least 0, got -1"),
        ({"sink_tokens": "4"}, TypeError, "sink_tokens must be an int, got '4'"),
        ({"placement": "experts"}, ValueError, "'expert', 'balanced', 'hash', got 'experts', did you mean 'expert'?"),
        ({"sliding_layers": "page"}, ValueError, "did you mean 'paged'?"),
        ({"num_shard": 4}, TypeError, "unknown option 'num_shard', did you mean 'num_shards'?"),
        ({"max_pages": 4}, ValueError, 'max_pages=4 is of routing, and routing="all" reads every page'),
        ({"coverage": 0.5, "routing": "all"}, ValueError, "coverage=0.5 is of routing"),
        ({"budget": "25"}, ValueError, r"a share \(0.25 or '25%'\), tokens .* or bytes .*, got '25'"),
        ({"zzz": 4}, TypeError, r"unknown option 'zzz' \(known: page_size"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(known", r"\(known") if "\\" not in message else message):
        PiKVConfig.from_dict(options)


def test_is_frozen() -> None:
    with pytest.raises(AttributeError):
        PiKVConfig().page_size = 8  # type: ignore[misc]


def test_json_must_be_an_object() -> None:
    with pytest.raises(TypeError, match="JSON object of options, got list"):
        PiKVConfig.from_json("[]")


def test_tiers_are_its_own() -> None:
    given: dict[str, str | int | None] = {"cpu": "1MiB"}
    config = PiKVConfig(tiers=given)
    given["disk"] = None
    assert config.tiers == {"cpu": "1MiB"}


def test_what_is_not_at_its_default() -> None:
    assert PiKVConfig().changed() == {}
    assert PiKVConfig(page_size=32, budget="25%").changed() == {"budget": "25%"}
