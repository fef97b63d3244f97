"""A press that changes nothing of a cache has no row filed under its name."""

from pathlib import Path
from typing import Any

import pytest

from pikv_hf.eval import evaluate_cache
from pikv_hf.eval.errors import InputError
from pikv_hf.presses import base_press

pytestmark = pytest.mark.slow

CODED = "pikv:key_codec=int4,value_codec=int4"


def evaluated(out: Path, **options: Any) -> Any:
    return evaluate_cache(suite="needle", lengths=(256,), depths=(50.0,), limit=1, output=out, **options)


@pytest.mark.parametrize("cache", ["pikv", "dynamic", CODED])
@pytest.mark.parametrize("query_aware", [False, True])
def test_a_press_that_did_nothing_is_refused(
    cache: str, query_aware: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on the first release that called the cache otherwise.
    monkeypatch.setattr(base_press, "cache_of_call", lambda kwargs: None)
    with pytest.raises(InputError, match=r"QueryAwarePress at ratio 0\.5 changed nothing: with it and without it"):
        evaluated(tmp_path, cache=cache, press="QueryAwarePress", ratio=0.5, query_aware=query_aware)
    assert not [file for file in tmp_path.rglob("predictions.csv*") if file.stat().st_size]


@pytest.mark.parametrize(
    ("cache", "press"),
    [
        ("pikv", "QueryAwarePress"),
        (CODED, "QueryAwarePress"),
        ("pikv", "AdaKVPress(KnormPress)"),
        # These free nothing there: one hides tokens, one changes them.
        ("dynamic", "AdaKVPress(KnormPress)"),
        ("dynamic", "PyramidPress(headwise=True)"),
        ("dynamic", "LoRAPress"),
        ("dynamic", "ThinKPress"),
        # It has nothing to do with a prompt.
        ("pikv", "DecodingPress(KnormPress, target_size=600)"),
    ],
)
def test_a_press_that_acts_is_not(cache: str, press: str, tmp_path: Path) -> None:
    ratio = None if press.startswith("Decoding") else 0.5
    assert evaluated(tmp_path, cache=cache, press=press, ratio=ratio) is not None
