"""Every decoder of the installed transformers does at least as well as the committed results of its release say.

`make models` writes those; what is new in a release, or better than they say, they are to be written anew for.
"""

from pathlib import Path
from typing import Any

import pytest

from pikv_hf import PiKVCache
from pikv_hf.eval.studies.models.families import Family, families
from pikv_hf.eval.studies.models.outcome import SAME, WAYS, Outcome, outcome_of, worse
from pikv_hf.eval.studies.models.run import FOLDER, read_outcomes, results_file
from pikv_hf.eval.studies.models.table import is_wrong
from pikv_hf.eval.studies.models.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]
FAMILIES = families()
RESULTS = results_file(ROOT / FOLDER)
KNOWN = read_outcomes(RESULTS)
#: Which of the strategies run here: the others are the rest of `make models`.
SHORT = ("greedy", "second turn")


def test_every_decoder_has_an_outcome() -> None:
    listed = {name for name, family in FAMILIES.items() if family.is_listed}
    assert listed <= set(KNOWN) <= set(FAMILIES), f"{RESULTS.name} is not of this release and code: run make models"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KNOWN))
def test_none_gets_worse(name: str) -> None:
    before = KNOWN[name]
    if before.way == "not run":
        pytest.skip(f"{name}: {before.reason}")
    assert not worse(outcome_of(FAMILIES[name], SHORT), before)


#: Known to be wrong where they are not refused, to be mended.
WRONG: set[str] = set()


def test_none_is_wrong() -> None:
    """What runs says the tokens of DynamicCache, or says in an error why not."""
    assert {name for name, outcome in KNOWN.items() if is_wrong(outcome)} <= WRONG


def test_every_refusal_has_its_reason() -> None:
    assert all(outcome.reason for outcome in KNOWN.values() if outcome.way in ("refused", "densely", "not run"))


GOOD = Outcome("a", "in place", placement="expert", routers=3, strategies={"greedy": SAME, "beams": SAME})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, []),
        ({"strategies": {"greedy": SAME}}, []),
        ({"routers": 4}, []),
        ({"way": "densely", "reason": "keys change"}, ["densely, not in place: keys change"]),
        ({"way": "refused", "reason": "why", "strategies": {}}, ["refused, not in place: why"]),
        ({"placement": "hash", "routers": 0}, ["0 routers, not 3"]),
        ({"strategies": {"greedy": "other tokens"}}, ["greedy: other tokens"]),
        ({"strategies": {}, "unsupported": {"greedy": "ValueError: no"}}, ["greedy: not run any more: ValueError: no"]),
    ],
)
def test_what_is_worse(changed: dict[str, Any], told: list[str]) -> None:
    fields = {name: getattr(GOOD, name) for name in GOOD.__slots__}
    assert worse(Outcome(**{**fields, **changed}), GOOD) == told


def test_ways_are_in_order() -> None:
    assert WAYS.index("refused") < WAYS.index("densely") < WAYS.index("in place")


def test_what_is_not_equal_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that loses its first token shows, in tokens or logits."""
    update = PiKVCache.update

    def forgetful(self: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
        return update(self, keys * 0.5, values, *args, **kwargs)

    monkeypatch.setattr(PiKVCache, "update", forgetful)
    outcome = outcome_of(FAMILIES["qwen3_moe"], SHORT)
    assert all(how.startswith(("other tokens", "logits differ")) for how in outcome.strategies.values())
    assert len(outcome.strategies) == 2


def test_a_model_that_fails_with_dynamic_cache_is_not_counted() -> None:
    outcome = outcome_of(Family("odd", "qwen3_moe", {"num_attention_heads": 3}, True), SHORT)
    assert (outcome.way, outcome.strategies) == ("not run", {})
    assert outcome.reason


@pytest.mark.parametrize("model_type", ["bart", "llama", "gpt2"])
def test_dense_models_have_no_router(model_type: str) -> None:
    with pytest.raises(ValueError, match=r"no router found|no decoder self-attention"):
        PiKVCache.for_model(tiny_model(model_type))
