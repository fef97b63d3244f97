"""Multi-head latent attention (MLA, DeepSeek-V2, arXiv 2405.04434): all heads share a token's latent and rotary key.

Newer releases of transformers cache these two, and expand all of them to keys and values of every head before they
attend; older ones expand first, and cache what comes of it. Over pages nothing is expanded: what makes keys of latents
goes into the queries, and what makes values of them comes after attention, as in the authors' own decoding.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from torch import nn

from ..common.foreign_attributes import ATTACHMENT_ATTRIBUTE
from ..layer.layer import PiKVLayer
from .latent_code import caches_expanded_latents
from .model_hook import CopiedHook, ModelHook

#: The method that expands latents `(B, 1, T, R)` and rotary keys `(B, 1, T, Dr)` to keys and values of all heads.
EXPANSION = "expand_kv"


def expands_latents(kind: type[nn.Module]) -> bool:
    """Return whether a class of attention expands latents that it has from the cache."""
    return callable(getattr(kind, EXPANSION, None))


def absorbs(module: nn.Module) -> bool:
    """Return whether an attention module's expansion can go into its queries and outputs instead.

    That is so where it is DeepSeek's: no more than a projection to the halves of keys and values, by a matrix that is
    there, and that nothing is added to, as adapters do.
    """
    kind: Any = type(module)
    if not expands_latents(kind) or _code_of_expansion(kind) != _known_code():
        return False
    return is_plain(module.kv_b_proj)


def expands_before_caching(module: Any) -> bool:
    """Return whether an attention module hands a cache what it expands of latents, by no more than a projection."""
    forward = getattr(inspect.unwrap(module.forward), "__code__", None)
    # Not one that was put in its place, of which nothing is known.
    own = forward is inspect.unwrap(type(module).forward).__code__
    kind: Any = type(module)
    return own and caches_expanded_latents(kind) and is_plain(module.kv_b_proj)


def is_plain(projection: Any) -> bool:
    """Return whether a projection is no more than a matrix that is there, and that nothing is added to."""
    if type(projection) is not nn.Linear or projection.bias is not None:
        return False
    weight = projection.weight
    plain = type(weight.data) is torch.Tensor and weight.is_floating_point() and not weight.is_meta
    # Its matrix may come and go with each call, as accelerate's hooks have it, or its output be changed by hooks.
    hooks = (*projection._forward_hooks.values(), *projection._forward_pre_hooks.values())
    watched = all(isinstance(hook, ModelHook | CopiedHook) for hook in hooks)
    return plain and watched and not vars(projection).keys() & {"_hf_hook", "forward"}


@functools.cache
def _code_of_expansion(kind: type[nn.Module]) -> str | None:
    try:
        method = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, EXPANSION)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    assert isinstance(method, ast.FunctionDef)
    # What it does, whatever its description says.
    return "\n".join(ast.dump(statement) for statement in method.body[1:])


@functools.cache
def _known_code() -> str:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    code = _code_of_expansion(DeepseekV3Attention)
    assert code is not None
    return code


def absorbed_queries(module: Any, query: torch.Tensor) -> torch.Tensor:
    """Return queries `(B, Hq, Q, Dn + Dr)` as they meet latents and rotary keys, `(B, Hq, Q, R + Dr)`."""
    plain, rotary = query[..., : module.qk_nope_head_dim], query[..., module.qk_nope_head_dim :]
    return torch.cat([torch.matmul(plain, projections(module)[0].to(plain.dtype)), rotary], dim=-1)


def expanded_outputs(module: Any, out: torch.Tensor) -> torch.Tensor:
    """Return sums of latents, `(B, Q, Hq, R)`, as sums of values, `(B, Q, Hq, Dv)`."""
    values = projections(module)[1].to(out.dtype)
    return torch.matmul(out.transpose(1, 2), values.transpose(1, 2)).transpose(1, 2).contiguous()


def projections(module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what makes keys and values of latents, `(Hq, Dn, R)` and `(Hq, Dv, R)`: views of one matrix."""
    sizes = module.qk_nope_head_dim, module.v_head_dim
    keys, values = module.kv_b_proj.weight.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
    return keys, values


def layer_of_latents(module: nn.Module) -> Any:
    """Return the layer of a cache whose latents an attention module's running call has expanded, None if there is none.

    Keys that are computed of latents do not carry a reference to the layer any more.
    """
    if not expands_latents(type(module)):
        return None
    attachment = getattr(module, ATTACHMENT_ATTRIBUTE, None)
    return None if attachment is None else attachment.referred_layer(module.layer_idx)


def holds_latents(layer: PiKVLayer, module: nn.Module) -> bool:
    """Return whether a layer of a cache holds the latents of an attention module."""
    if expands_latents(type(module)):
        return layer.store.heads == 1
    return layer.edits.latents.expansion() is not None
