"""Scheduling policies in files go by the names they are registered under; one that is not known is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edited_files import rewritten
from golden_caches import GOLDEN, cache_file, golden_model

from pikv_hf import PiKVCache
from pikv_hf.scheduling.policies.registry import POLICIES
from pikv_hf.serialization.older_versions import upgraded
from pikv_hf.serialization.tensor_file import CacheFileError


def in_version_1(layers: list[Any], tensors: dict[str, Any]) -> None:
    layers[0]["schedule"]["policy"][0] = "Another"


def in_version_3(layers: list[Any], tensors: dict[str, Any]) -> None:
    layers[0]["parts"][0]["scheduler"]["policy"] = "Another"


@pytest.mark.parametrize(("version", "change"), [("1", in_version_1), ("3", in_version_3)])
def test_an_unknown_policy_is_refused_by_name(
    version: str, change: Callable[[list[Any], dict[str, Any]], None], tmp_path: Path
) -> None:
    model = golden_model()
    path = rewritten(cache_file(GOLDEN / version, "budget"), tmp_path / "cache", change)
    with pytest.raises(CacheFileError, match=r"layer 0: .* by the policy 'Another', and this release knows .*lru"):
        PiKVCache.load(path, model)
    # Who asks for another policy does without what that one knew.
    scheduler = PiKVCache.load(path, model, scheduler="lru").layers[0].parts[0].scheduler
    assert (scheduler.policy.name, scheduler.pages_evicted) == ("lru", 2)


@pytest.mark.parametrize(("kind", "name"), [("budget", "quest"), ("tiers", "pikv")])
def test_names_of_classes_become_those_of_the_registry(kind: str, name: str) -> None:
    content = cache_file(GOLDEN / "1", kind).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    layers, _ = upgraded("1", json.loads(header["__metadata__"]["layers"]), header.keys())
    assert layers[0]["parts"][0]["scheduler"]["policy"] == name
    assert name in POLICIES


@pytest.mark.parametrize("version", ["1", "3"])
def test_a_policy_goes_on_with_its_state(version: str) -> None:
    model = golden_model()
    policy = PiKVCache.load(cache_file(GOLDEN / version, "tiers"), model).layers[0].parts[0].scheduler.policy
    assert policy.name == "pikv"
    # 0.1 at first.
    assert policy.threshold == pytest.approx(0.115)
