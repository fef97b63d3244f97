"""A fingerprint of a model, which differs where its keys and values would.

It covers the config, dtypes, a sample of the weights, the adapters in use, and what rotary embeddings and the like
compute with. What hooks do, or arguments of calls, it does not see.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from ..integration.model_modules import unwrapped
from .format import ADAPTER, MODEL, read_keys
from .model_adapters import Adapter, adapters_in_use, difference, modules_without_adapters, named
from .weight_digests import Weight, digests_of, sample_of, stored_tensors

#: Numbers of each constant that are compared.
CONSTANT_SAMPLES = 8

#: By what part of itself a constant may differ: devices compute angles differently in the last bits.
CONSTANT_TOLERANCE = 1e-4

# Fields of a config that change no key and no value: names, token ids, what is returned, training. The dtype is noted
# as that of the parameters, since a config need not know it.
_IGNORED = frozenset(
    [
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
_LAYER = re.compile(r".*?\.\d+(?=\.)")
# So many differences are named in a message.
_NAMED = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a model computes keys and values with; of a config alone it has the config and nothing else.

    Attributes
    ----------
    config : dict
        Fields of the decoder's config that may matter, as plain values.
    dtypes : list of str or None
        Of the floating-point parameters, sorted.
    weights : dict or None
        By part of the model, such as `"model.layers.3"`, a digest of some numbers of each of its parameters and saved
        buffers, in float32; None where these are not to be had, as of parameters that accelerate has moved to disk
        without a map. A sample: a change of a few single numbers goes unnoticed. Adapters do not count.
    constants : dict or None
        By name, up to eight numbers of each vector that is not saved with the weights but made anew, such as the
        frequencies of rotary embeddings, and the factors of these. None if the file is too old to say.
    adapters : list of Adapter or None
        Those in use. None if the file is too old to say.
    transformers : str
        Its release, since configs gain and lose fields between them.
    """

    config: dict[str, Any]
    dtypes: list[str] | None
    weights: dict[str, str | None] | None
    constants: dict[str, list[float]] | None
    adapters: list[Adapter] | None
    transformers: str

    @classmethod
    def of(cls, model: Any, as_registered: bool = False) -> "Fingerprint":
        """Take the fingerprint of a model, on whatever devices it is; no more than the samples is moved.

        Weights go into a digest by name. Up to version 3 they did `as_registered`, an order which PEFT may change.
        """
        model = unwrapped(model)
        modules = list(modules_without_adapters(model))
        stored = [each for prefix, module in modules for each in _named_tensors(prefix, module)]
        ordered = stored if as_registered else sorted(stored, key=lambda each: each[0])
        weights: list[Weight] = [(_part_of(name), name, tensor) for name, tensor in ordered]
        parameters = [p for _, module in modules for p in module._parameters.values() if p is not None]
        floating = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in floating)
        constants = dict(_constants(modules))
        adapters = adapters_in_use(model)
        return cls(_plain(model.config), dtypes, digests_of(weights), constants, adapters, transformers.__version__)

    @classmethod
    def of_config(cls, config: Any) -> "Fingerprint":
        """Return what is known of a model that is not there."""
        return cls(_plain(config), None, None, None, None, transformers.__version__)

    @classmethod
    def read(cls, saved: dict[str, Any]) -> "Fingerprint":
        """Return a fingerprint out of a file, of which :meth:`to_dict` made plain values."""
        values = read_keys(MODEL, saved, "the model's fingerprint")
        if (adapters := values["adapters"]) is not None:
            values["adapters"] = [Adapter(**read_keys(ADAPTER, each, "an adapter")) for each in adapters]
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, of which :meth:`read` makes the fingerprint again."""
        return dataclasses.asdict(self)

    def differences(self, model: "Fingerprint") -> str:
        """Say in words how a model's fingerprint differs from this one, which was saved; empty if it does not."""
        return self._config_differences(model) or (
            "" if self.weights is None or model.weights is None else self._computed_differences(model)
        )

    def _config_differences(self, model: "Fingerprint") -> str:
        names = self.config.keys() | model.config.keys()
        if self.transformers != model.transformers:
            names = self.config.keys() & model.config.keys()
        differing = [name for name in sorted(names) if self.config.get(name) != model.config.get(name)]
        texts = [_both(name, self.config.get(name), model.config.get(name)) for name in differing[:_NAMED]]
        more = [f"and {len(differing) - _NAMED} more fields of the config"] if len(differing) > _NAMED else []
        return "; ".join([*texts, *more])

    def _computed_differences(self, model: "Fingerprint") -> str:
        if self.dtypes != model.dtypes:
            return _both("the parameters' dtype", ", ".join(self.dtypes or ()), ", ".join(model.dtypes or ()))
        return self._adapter_differences(model) or self._weight_differences(model) or self._constant_differences(model)

    def _adapter_differences(self, model: "Fingerprint") -> str:
        here = model.adapters or []
        if self.adapters is not None:
            return difference(self.adapters, here)
        if not here:
            return ""
        return (
            "with adapters of which nothing is known, since files up to version 3 do not say which were active, where "
            f"this one has {named(here)} active"
        )

    def _weight_differences(self, model: "Fingerprint") -> str:
        saved, here = self.weights or {}, model.weights or {}
        if unshared := sorted(saved.keys() ^ here.keys()):
            where = "the saved model" if unshared[0] in saved else "this model"
            return f"only {where} has parameters in {unshared[0]}"
        pairs = {name: (digest, here[name]) for name, digest in saved.items()}
        differing = [name for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]]
        if not differing:
            return ""
        what = _both(f"the digest of the weights of {differing[0]}", *pairs[differing[0]])
        return f"{what} ({len(differing)} of {len(pairs)} parts of the model differ)"

    def _constant_differences(self, model: "Fingerprint") -> str:
        saved, here = self.constants or {}, model.constants or {}
        for name in sorted(saved.keys() & here.keys()):
            one, other = saved[name], here[name]
            close = [math.isclose(*pair, rel_tol=CONSTANT_TOLERANCE) for pair in zip(one, other, strict=False)]
            if len(one) != len(other) or not all(close):
                return _both(f"some numbers of {name}", one, other)
        return ""


def _plain(config: Any) -> dict[str, Any]:
    fields = config.get_text_config(decoder=True).to_dict()
    kept = {name: value for name, value in fields.items() if name not in _IGNORED}
    # Through JSON, as one that was saved has been.
    return dict(json.loads(json.dumps(kept, sort_keys=True, default=str)))


def _both(what: str, saved: object, here: object) -> str:
    return f"{what} is {saved!r} there and {here!r} here"


def _part_of(name: str) -> str:
    """Return the decoder layer of a parameter, or else its module."""
    layer = _LAYER.match(name)
    return layer[0] if layer else name.rpartition(".")[0] or name


def _named_tensors(prefix: str, module: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    for name, tensor in stored_tensors(module):
        yield f"{prefix}.{name}".lstrip("."), tensor


def _constants(modules: list[tuple[str, nn.Module]]) -> Iterator[tuple[str, list[float]]]:
    """Yield some numbers of each vector that a model computes with and does not save, and the factors of angles."""
    for prefix, module in modules:
        for name in sorted(module._non_persistent_buffers_set):
            tensor = module._buffers.get(name)
            known = (
                tensor is not None and tensor.is_floating_point() and tensor.ndim < 2 and tensor.device.type != "meta"
            )
            if known and tensor is not None and tensor.numel() and not _varies(module, name):
                numbers = sample_of(tensor.reshape(-1), CONSTANT_SAMPLES)
                yield f"{prefix}.{name}", [float(f"{number:.6g}") for number in numbers.float().tolist()]
        for name, value in vars(module).items():
            if name.endswith("attention_scaling") and isinstance(value, float):
                yield f"{prefix}.{name}", [value]


def _varies(module: nn.Module, name: str) -> bool:
    """Return whether a buffer changes with the length of what is read: then there is one beside it that does not."""
    types = getattr(module, "rope_type", "")
    changing = any(kind in str(types) for kind in ("dynamic", "longrope"))
    return changing and name.endswith("inv_freq") and not name.endswith("original_inv_freq")
