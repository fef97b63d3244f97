"""Which modules of a model are of its text decoder, in models that see, hear or speak too."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig


def decoder_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of a model, but for what its other parts have: towers for images or sound, resamplers.

    These have configs of their own among those that the model's config holds. They may take a cache as the decoder's
    layers do, and are never handed the decoder's.
    """
    others = _kinds_beside(model.config, model.config.get_text_config(decoder=True))
    skipped: str | None = None
    for name, module in model.named_modules():
        if skipped is not None and name.startswith(skipped):
            continue
        skipped = f"{name}." if type(getattr(module, "config", None)) in others else None
        if skipped is None:
            yield name, module


def _kinds_beside(config: Any, text: Any) -> set[type]:
    """Return the classes of the configs within a config, however deep, that neither are the text decoder's nor hold it.

    Classes, since layers that were copied have configs of their own.
    """
    every = list(_configs_within(config))
    around = {type(each) for each in every if any(inside is text for inside in _configs_within(each))}
    return {type(each) for each in every} - around - {type(config), type(text)}


def _configs_within(config: Any) -> Iterator[Any]:
    """Yield a config and all that it holds."""
    yield config
    for name in getattr(config, "sub_configs", ()):
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _configs_within(part)
