"""A fingerprint of a model, which differs where its keys and values would: config, dtypes, a sample of its weights."""

import dataclasses
import functools
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from torch import nn

#: Numbers of each parameter that go into the digest, evenly spread over it.
SAMPLES = 64

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
    """The config, the dtypes and digests of the weights of a model.

    Attributes
    ----------
    config : dict
        Fields of the decoder's config that may matter, as plain values.
    dtypes : list of str
        Of the floating-point parameters, sorted.
    weights : dict
        By part of the model, such as `"model.layers.3"`, a digest of some numbers of each of its parameters and saved
        buffers, in float32; None where these are not to be had, as of parameters that accelerate has moved to disk
        without a map. A sample: a change of a few single numbers goes unnoticed.
    transformers : str
        Its release, since configs gain and lose fields between them.
    """

    config: dict[str, Any]
    dtypes: list[str]
    weights: dict[str, str | None]
    transformers: str

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """Take the fingerprint of a model, on whatever devices it is; no more than the samples is moved."""
        config = model.config.get_text_config(decoder=True).to_dict()
        kept = {name: value for name, value in config.items() if name not in _IGNORED}
        floating = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in floating)
        # Through JSON, as one that was saved has been.
        plain = json.loads(json.dumps(kept, sort_keys=True, default=str))
        return cls(plain, dtypes, _digests(model), transformers.__version__)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, of which `Fingerprint(**values)` makes the fingerprint again."""
        return dataclasses.asdict(self)

    def differences(self, model: "Fingerprint") -> str:
        """Say in words how a model's fingerprint differs from this one, which was saved; empty if it does not."""
        names = self.config.keys() | model.config.keys()
        if self.transformers != model.transformers:
            names = self.config.keys() & model.config.keys()
        differing = [name for name in sorted(names) if self.config.get(name) != model.config.get(name)]
        if differing:
            texts = [_both(name, self.config.get(name), model.config.get(name)) for name in differing[:_NAMED]]
            more = [f"and {len(differing) - _NAMED} more fields of the config"] if len(differing) > _NAMED else []
            return "; ".join([*texts, *more])
        if self.dtypes != model.dtypes:
            return _both("the parameters' dtype", ", ".join(self.dtypes), ", ".join(model.dtypes))
        return self._weight_differences(model)

    def _weight_differences(self, model: "Fingerprint") -> str:
        if unshared := sorted(self.weights.keys() ^ model.weights.keys()):
            where = "the saved model" if unshared[0] in self.weights else "this model"
            return f"only {where} has parameters in {unshared[0]}"
        pairs = {name: (digest, model.weights[name]) for name, digest in self.weights.items()}
        differing = [name for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]]
        if not differing:
            return ""
        what = _both(f"the digest of the weights of {differing[0]}", *pairs[differing[0]])
        return f"{what} ({len(differing)} of {len(pairs)} parts of the model differ)"


def _both(what: str, saved: object, here: object) -> str:
    return f"{what} is {saved!r} there and {here!r} here"


def _digests(model: nn.Module) -> dict[str, str | None]:
    """Return the digest of each part of a model."""
    stored = list(_stored_tensors(model))
    samples = _on_host([None if tensor is None else _sample(tensor) for _, tensor in stored])
    digests = {part: xxhash.xxh3_64() for part in dict.fromkeys(_part_of(name) for name, _ in stored)}
    unknown = set()
    for (name, tensor), sample in zip(stored, samples, strict=True):
        part = _part_of(name)
        if tensor is None or sample is None:
            unknown.add(part)
            continue
        digests[part].update(f"{name} {tuple(tensor.shape)}".encode())
        digests[part].update(sample.data)
    return {part: None if part in unknown else digest.hexdigest() for part, digest in digests.items()}


def _part_of(name: str) -> str:
    """Return the decoder layer of a parameter, or else its module."""
    layer = _LAYER.match(name)
    return layer[0] if layer else name.rpartition(".")[0] or name


def _stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield parameters and the buffers that are saved with them; None where the numbers are not to be had."""
    for prefix, module in model.named_modules():
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                plain = tensor.data if tensor.device.type != "meta" else _offloaded(module, name)
                yield f"{prefix}.{name}".lstrip("."), plain if type(plain) is torch.Tensor else None


def _offloaded(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return a parameter that accelerate keeps elsewhere until the module runs."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        if weights is not None:
            return weights[name]
    return None


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return at most SAMPLES numbers of a tensor, on its device."""
    indices = _spread_indices(tensor.numel(), tensor.device)
    return tensor.view(-1)[indices] if tensor.is_contiguous() else tensor[torch.unravel_index(indices, tensor.shape)]


@functools.lru_cache(maxsize=64)
def _spread_indices(total: int, device: torch.device) -> torch.Tensor:
    """Return at most SAMPLES of the numbers 0..total-1, evenly spread."""
    some = min(SAMPLES, total)
    return torch.arange(some, device=device) * total // max(1, some)


def _on_host(samples: list[torch.Tensor | None]) -> list[np.ndarray | None]:
    """Return samples in float32 on the host, with one transfer for each device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample is not None:
            alike[sample.device, sample.dtype].append(index)
    fetched: list[np.ndarray | None] = [None] * len(samples)
    for indices in alike.values():
        parts = [part for index in indices if (part := samples[index]) is not None]
        ends = np.cumsum([len(part) for part in parts])[:-1]
        together = torch.cat(parts).float().cpu().numpy()
        for index, numbers in zip(indices, np.split(together, ends), strict=True):
            fetched[index] = numbers
    return fetched
