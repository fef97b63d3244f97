"""What becomes of a model with this cache: which layers are paged, how they are read, which strategies equal."""

import collections
import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf import PiKVCache, PiKVConfig
from pikv_hf.eval.studies.models.families import Family
from pikv_hf.eval.studies.models.strategies import STRATEGIES, Make, Seen, Strategy, padded
from pikv_hf.eval.studies.models.tiny_models import tiny_model
from pikv_hf.integration.attachment import ensure_attached
from pikv_hf.layer.layer import PiKVLayer

#: Small pages and windows, so that a short prompt fills some.
SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
#: Ways of being used, the better ones last.
WAYS = ("not run", "refused", "own layers", "densely", "in place")
SAME = "same"
#: Layers whose indexer is told of no mask.
COMPARES_PADDING = "minimax_m3_sparse"
#: Logits may differ by so much of the largest: sums in another order.
TOLERANCE = 2e-4


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a family.

    Attributes
    ----------
    family : str
        Its name.
    way : str
        One of :data:`WAYS`: whether attention reads pages in place, gets all K/V densely, or no layer is paged.
    reason : str or None
        Why it was refused or not run, or is read densely.
    placement : str or None
        `"expert"` if routers were found, else `"hash"`; None unless attached.
    routers : int or None
        The layers with a router that is followed.
    layers : dict
        How many layers of the cache are of which class.
    tokens : int
        Distinct tokens that greedy search produced: with one or two, only logits say anything.
    strategies : dict
        From names to :data:`SAME`, or how they differ or fail; those that `DynamicCache` fails at are left out.
    unsupported : dict
        Strategies that fail with `DynamicCache`, or with the model's own cache, and how.
    """

    family: str
    way: str
    reason: str | None = None
    placement: str | None = None
    routers: int | None = None
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    strategies: dict[str, str] = dataclasses.field(default_factory=dict)
    unsupported: dict[str, str] = dataclasses.field(default_factory=dict)


def outcome_of(family: Family, names: Iterable[str] | None = None) -> Outcome:
    """Build a tiny model of a family and run strategies with `DynamicCache` and with this cache.

    Parameters
    ----------
    family : Family
        What to build.
    names : iterable of str, optional
        The strategies to run; all of them by default, and those with int8 pages and with paged sliding windows.
    """
    try:
        model = tiny_model(family.model_type, **family.overrides)
    except Exception as error:
        return Outcome(family.name, "not run", f"not built: {_told(error)}")
    chosen = STRATEGIES if names is None else {name: STRATEGIES[name] for name in names}
    with _in_eager(model):
        expected, unsupported = _expected(model, chosen)
        if not expected:
            why = f"DynamicCache: {next(iter(unsupported.values()))}"
            return Outcome(family.name, "not run", why, unsupported=unsupported)
        alone = _run_alone(model, expected) if names is None else {}
    judged = functools.partial(_judged, family.name, model, chosen, expected, unsupported)
    try:
        attachment, placement = _attached(model)
    except ValueError as error:
        with _in_eager(model):
            return judged({}, None, None, str(error))
    return judged(alone, placement, len(attachment.expert_routers), None)


@contextlib.contextmanager
def _in_eager(model: Any) -> Iterator[None]:
    """Let a model's attention be the one in plain torch: transformers' SDPA leaves softcaps and sinks out.

    But not where layers compare padding, too: of it eager attention makes averages, and SDPA, as PiKV's, nothing.
    """
    if COMPARES_PADDING in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        yield
        return
    # Each part has a config of its own, and not every part can have each attention.
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    with contextlib.suppress(ValueError):
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _run_alone(model: Any, expected: dict[str, Seen]) -> dict[str, str]:
    """Run the padded batch with a cache of the config alone, where such a cache is not refused."""
    if "padded batch" not in expected:
        return {}
    try:
        PiKVCache(model.config)
    except ValueError:
        return {}
    make = functools.partial(PiKVCache, model.config, PiKVConfig(**SMALL))
    return {"not attached": _compared(padded, model, make, expected["padded batch"])}


def worse(now: Outcome, before: Outcome) -> list[str]:
    """Return in what an outcome is worse than an earlier one, in strategies that ran now; nothing if in none."""
    found: list[str] = []
    if (now.way, before.way) == ("not run", "refused"):
        # Of few strategies DynamicCache may fail at all.
        return found
    if WAYS.index(now.way) < WAYS.index(before.way):
        found.append(f"{now.way}, not {before.way}: {now.reason}")
    elif now.way != "refused" and (now.routers or 0) < (before.routers or 0):
        found.append(f"{now.routers} routers, not {before.routers}")
    for name, how in now.strategies.items():
        if how != SAME and before.strategies.get(name) == SAME:
            found.append(f"{name}: {how}")
    for name, why in now.unsupported.items():
        if before.strategies.get(name) == SAME:
            found.append(f"{name}: not run any more: {why}")
    return found


def _attached(model: Any) -> tuple[Any, str]:
    """Attach a model by its routers if it has any that can be read, else by position; return by which."""
    with _quietly():
        try:
            PiKVCache.for_model(model, placement="expert")
            return ensure_attached(model, "expert"), "expert"
        except ValueError:
            PiKVCache.for_model(model, placement="hash")
            return ensure_attached(model, "hash"), "hash"


def _expected(model: Any, chosen: dict[str, Strategy]) -> tuple[dict[str, Seen], dict[str, str]]:
    """Return what strategies see with `DynamicCache`, where it fails with the model's own cache, and how they fail."""
    config = model.config.get_text_config(decoder=True)
    makes: tuple[Make, ...] = (lambda: DynamicCache(config=config), lambda: None)
    seen: dict[str, Seen] = {}
    failed: dict[str, str] = {}
    for make in makes:
        seen, failed = {}, {}
        for name, strategy in chosen.items():
            try:
                seen[name] = _run(strategy, model, make)
            except Exception as error:
                failed[name] = _told(error)
        if seen:
            break
    return seen, failed


def _judged(
    name: str,
    model: Any,
    chosen: dict[str, Strategy],
    expected: dict[str, Seen],
    unsupported: dict[str, str],
    alone: dict[str, str],
    placement: str | None,
    routers: int | None,
    refusal: str | None,
) -> Outcome:
    """Run all strategies with this cache, by its config alone if attaching was refused."""
    caches: list[PiKVCache] = []

    def make(**options: Any) -> PiKVCache:
        if placement is None:
            cache = PiKVCache(model.config, PiKVConfig(**{**SMALL, **options}))
        else:
            cache = PiKVCache.for_model(model, **{**SMALL, "placement": placement, **options})
        caches.append(cache)
        return cache

    try:
        make()
    except ValueError as error:
        return Outcome(name, "refused", refusal or str(error), unsupported=unsupported)
    results = {each: _compared(chosen[each], model, make, seen) for each, seen in expected.items()}
    reading = caches[-1]
    if refusal is not None and all(how.startswith("fails: ") for how in results.values()):
        return Outcome(name, "refused", refusal, unsupported=unsupported)
    if len(chosen) == len(STRATEGIES) and "padded batch" in expected:
        results |= {**alone, **_further(model, make, expected["padded batch"])}
    seen = next(iter(expected.values()))[0]
    kinds = collections.Counter(type(layer).__name__ for layer in reading.layers)
    way, reason = _way_of(reading, refusal)
    return Outcome(name, way, reason, placement, routers, dict(kinds), seen.unique().numel(), results, unsupported)


def _further(model: Any, make: Callable[..., Any], expected: Seen) -> dict[str, str]:
    """Run the padded batch with other ways of storing it: windows in pages, and int8, which only has to run."""
    coded = functools.partial(make, key_codec="int8", value_codec="int8")
    results = {"int8 runs": _compared(padded, model, coded, expected, exact=False)}
    if getattr(model.config.get_text_config(decoder=True), "sliding_window", None):
        windows = functools.partial(make, sliding_layers="paged")
        results["sliding windows in pages"] = _compared(padded, model, windows, expected)
    return results


def _compared(strategy: Strategy, model: Any, make: Make, expected: Seen, exact: bool = True) -> str:
    """Return :data:`SAME`, or how what a strategy sees with our cache differs from what was expected."""
    try:
        seen = _run(strategy, model, make)
    except Exception as error:
        return f"fails: {_told(error)}"
    if [found.shape for found in seen] != [wanted.shape for wanted in expected]:
        return "other shapes"
    if not exact:
        return SAME if all(found.isfinite().all() for found in seen) else "not finite"
    return next((how for pair in zip(seen, expected, strict=True) if (how := _difference(*pair))), SAME)


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    if not wanted.is_floating_point():
        return None if torch.equal(found, wanted) else "other tokens"
    if torch.equal(found, wanted):
        return None
    apart = float((found - wanted).abs().nan_to_num(torch.inf).max())
    return f"logits differ by {apart:.1e}" if apart > TOLERANCE * max(1.0, float(wanted.abs().max())) else None


def _way_of(cache: PiKVCache, refusal: str | None) -> tuple[str, str | None]:
    """Return how attention reads a used cache, and why not in place."""
    paged = [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]
    if not paged:
        return "own layers", None
    if refusal is not None:
        return "densely", refusal
    dense = cache.stats().dense_layers
    return ("densely", next(iter(dense.values()))) if dense else ("in place", None)


def _run(strategy: Strategy, model: Any, make: Make) -> Seen:
    with torch.no_grad(), _quietly():
        return strategy(model, make)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _told(error: Exception) -> str:
    """Return an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
