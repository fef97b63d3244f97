"""Time decoding with torch's own attention over dense bf16 keys and values, in the fastest of its backends."""

import dataclasses
import warnings

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from pikv_hf.eval.gpu.arena import fill_random
from pikv_hf.eval.gpu.checks import reason
from pikv_hf.eval.gpu.copy_speed import Bench
from pikv_hf.eval.gpu.geometry import Shape
from pikv_hf.eval.gpu.timing import Timing

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")

#: Calls by which backends are compared.
FEW_CALLS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class DenseSpeed:
    """The fastest backend on a shape.

    Attributes
    ----------
    backend : str or None
        Its name; None if none ran.
    timing : Timing or None
        Of the backend.
    tried : dict
        Median milliseconds of a few calls of each backend, or why it did not run.
    """

    backend: str | None
    timing: Timing | None
    tried: dict[str, float | str]


def dense_speed(bench: Bench, shape: Shape) -> DenseSpeed:
    """Time `scaled_dot_product_attention` with one query per row, `enable_gqa` and no mask."""
    if too_large := bench.too_large(shape.dense_bytes):
        return DenseSpeed(None, None, {"all": too_large})
    try:
        return _fastest(bench, shape)
    except RuntimeError as error:  # A kernel measured before may have left the device unusable.
        return DenseSpeed(None, None, {"all": reason(error)})


def _fastest(bench: Bench, shape: Shape) -> DenseSpeed:
    bench.arena.reset()
    geometry, rows = shape.geometry, (shape.batch, shape.geometry.kv_heads, shape.tokens)
    keys = fill_random(bench.arena.take(*rows, geometry.dim, dtype=torch.bfloat16))
    values = fill_random(bench.arena.take(*rows, geometry.value_dim, dtype=torch.bfloat16))
    query = torch.randn(shape.batch, geometry.query_heads, 1, geometry.dim, device=bench.device, dtype=torch.bfloat16)
    tried: dict[str, float | str] = {}
    for name in BACKENDS:
        try:
            tried[name] = _timed(bench, name, query, keys, values, FEW_CALLS).p50_ms
        except RuntimeError as error:  # Not every backend takes every shape; some need memory that is not there.
            tried[name] = reason(error)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    ran = {name: spent for name, spent in tried.items() if isinstance(spent, float)}
    if not ran:
        return DenseSpeed(None, None, tried)
    fastest = min(ran, key=ran.__getitem__)
    return DenseSpeed(fastest, _timed(bench, fastest, query, keys, values), tried)


def _timed(
    bench: Bench, name: str, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, most: int | None = None
) -> Timing:
    def call() -> torch.Tensor:
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    with sdpa_kernel(getattr(SDPBackend, name)), warnings.catch_warnings():
        # A backend that does not take the shape warns why, and then raises.
        warnings.simplefilter("ignore")
        return bench.stopwatch(call) if most is None else bench.stopwatch(call, most)
