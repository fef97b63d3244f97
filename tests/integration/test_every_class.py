"""Every causal language model class of transformers: attached the same as with DynamicCache, or refused."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_outcomes import DENSE, NOT_RUN, REFUSED, ROUTED, VARIANTS
from tiny_models import VOCAB, tiny_model
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from pikv_hf import PiKVCache

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
PADDING = 9
OUTCOMES = {
    **dict.fromkeys(DENSE | ROUTED, "same"),
    **{name: phrase for phrase, names in REFUSED.items() for name in names},
}
Make = Callable[[], Any]
# Of what a program returns, what is compared: tokens or logits.
Seen = list[torch.Tensor]
Program = Callable[[Any, Make], Seen]


def test_every_class_has_an_outcome() -> None:
    assert set(CLASSES) == {*OUTCOMES, *NOT_RUN}, "a class is new, or gone: see tests/support/family_outcomes.py"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(CLASSES))
def test_as_dynamic_cache_or_refused(model_type: str) -> None:
    if model_type in NOT_RUN:
        pytest.skip(f"{model_type}: {NOT_RUN[model_type]}")
    check_outcome(tiny_model(model_type), OUTCOMES[model_type], "expert" if model_type in ROUTED else "hash")


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options", "outcome"), VARIANTS)
def test_other_layers_than_by_default(model_type: str, options: dict[str, Any], outcome: str) -> None:
    check_outcome(tiny_model(model_type, **options), outcome, "hash")


@pytest.mark.parametrize("model_type", sorted(DENSE & {"bart", "llama", "gpt2"}))
def test_dense_models_have_no_router(model_type: str) -> None:
    with pytest.raises(ValueError, match="no router found"):
        PiKVCache.for_model(tiny_model(model_type))


def check_outcome(model: Any, outcome: str, placement: str) -> None:
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = check_config_alone(model)
    model.set_attn_implementation(implementation)
    if outcome != "same":
        with pytest.raises(ValueError, match=outcome):
            PiKVCache.for_model(model, placement="hash")
        assert model.config._attn_implementation == implementation
        return
    programs = PROGRAMS
    if not expected:
        # A model with room for other state makes a cache of its own, with an attribute that DynamicCache has not.
        programs = (greedy,)
        expected = seen_by(model, lambda: None, programs)
        assert expected, "the model does not run"
    options: dict[str, Any] = {**SMALL, "placement": placement}
    for layers in ("bounded", "paged") if getattr(model.config, "sliding_window", None) else ("bounded",):
        make = functools.partial(PiKVCache.for_model, model, sliding_layers=layers, **options)
        compare(seen_by(model, make, programs), expected)


def check_config_alone(model: Any) -> dict[str, Seen]:
    """Return what programs see with DynamicCache, and check that a cache of the config alone shows them the same."""
    try:
        PiKVCache(model.config)
    except ValueError:
        with pytest.raises(ValueError, match=r"layers of type|recurrent state"):
            PiKVCache(model.config)
        return {}
    config = model.config.get_text_config(decoder=True)
    expected = seen_by(model, lambda: DynamicCache(config=config), PROGRAMS)
    compare(seen_by(model, lambda: PiKVCache(model.config), PROGRAMS), expected)
    return expected


def seen_by(model: Any, make: Make, programs: tuple[Program, ...]) -> dict[str, Seen]:
    """Return what each program sees with new caches; those that the model cannot do with them are left out."""
    seen = {program.__name__: results_of(program, model, make) for program in programs}
    return {name: results for name, results in seen.items() if results}


def results_of(program: Program, model: Any, make: Make) -> Seen:
    try:
        with torch.no_grad():
            return program(model, make)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, AssertionError):
        return []


def compare(ours: dict[str, Seen], theirs: dict[str, Seen]) -> None:
    for name, expected in theirs.items():
        assert name in ours, f"{name} fails"
        for found, wanted in zip(ours[name], expected, strict=True):
            assert found.shape == wanted.shape, name
            allowed = 2e-4 * max(1.0, float(wanted.abs().max())) if wanted.is_floating_point() else 0
            assert (found - wanted).abs().max() <= allowed, name


def tokens(count: int, batch: int, seed: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))


def padded(batch: int = 2) -> dict[str, torch.Tensor]:
    ids = tokens(30, batch, 1)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, new: int, **options: Any) -> Any:
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(
        **inputs, **given, **options, max_new_tokens=new, do_sample=False, pad_token_id=0, return_dict_in_generate=True
    )


def greedy(model: Any, make: Make) -> Seen:
    out = generate(model, padded(), make(), 5, output_logits=True)
    return [out.sequences, *out.logits]


def second_turn(model: Any, make: Make) -> Seen:
    cache = make()
    first = generate(model, padded(), cache, 5).sequences
    ids = torch.cat([first, tokens(7, 2, 2)], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    out = generate(model, {"input_ids": ids, "attention_mask": mask}, cache, 3, output_logits=True)
    return [out.sequences, *out.logits]


def beams(model: Any, make: Make) -> Seen:
    return [generate(model, padded(), make(), 5, num_beams=3).sequences]


def chunks(model: Any, make: Make) -> Seen:
    cache = make()
    return [model(tokens(count, 1, count), past_key_values=cache, use_cache=True).logits for count in (30, 7)]


PROGRAMS: tuple[Program, ...] = (second_turn, beams, chunks)
