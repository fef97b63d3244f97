"""Fixtures of the tests of saving and loading."""

import pytest


@pytest.fixture
def few_tokens_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide shards anew, and move pages, in caches of little more than a hundred tokens too."""
    monkeypatch.setattr("pikv_hf.sharding.shard_map.MIN_PAGES", 1)
    monkeypatch.setattr("pikv_hf.layer.page_migration.MIN_PAGES", 1)
