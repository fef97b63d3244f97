"""What the attention of a decoding step reads and computes in one layer."""

import dataclasses
import math

from pikv_hf.config import PiKVConfig

from .cache_contents import CacheContents
from .cache_memory import is_packed, kept_bounds, key_codes_bytes, packed_page_bytes
from .model_shape import DTYPE_BYTES, LayerShape
from .page_counts import page_counts, shard_loads


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionWork:
    """Of one layer, step and device, over all rows.

    Attributes
    ----------
    bytes_read : float
        K/V as they came, and what pages are ranked by; without codes of K/V.
    scattered_bytes : float
        Of these, and of codes, what lies scattered because routing chose it.
    coded : tuple of (str, float, float, float)
        Codec, packed numbers, their bytes, and the operations of products with them.
    flops : float
        Of all other products.
    logits : float
        Products of a query and a key that no coded kernel makes.
    """

    bytes_read: float
    scattered_bytes: float
    coded: tuple[tuple[str, float, float, float], ...]
    flops: float
    logits: float

    @property
    def stored_bytes(self) -> float:
        """Bytes read from memory, codes included."""
        return self.bytes_read + sum(stored for _, _, stored, _ in self.coded)


def layer_work(layer: LayerShape, contents: CacheContents, dtype: str) -> AttentionWork:
    """Return what a step reads of one layer's stored tokens.

    Parameters
    ----------
    layer : LayerShape
        Heads and dims.
    contents : CacheContents
        What the layer stores on this device.
    dtype : str
        Of K/V.
    """
    tokens, batch, options = contents.tokens, contents.batch, contents.options
    element, size = DTYPE_BYTES[dtype], options.page_size
    if layer.sliding is not None:
        work = _plain(layer, batch, min(tokens, layer.sliding), 0.0, element)
        # States are read and written.
        return dataclasses.replace(work, bytes_read=work.bytes_read + 2 * batch * layer.state_bytes)
    counts = page_counts(tokens, options, shard_loads(layer, options, contents.loads), layer.experts, contents.share)
    read = chosen_pages(counts.full, options)
    routed = read < counts.full
    always = (counts.window + counts.open) * size
    if not is_packed(options):
        # Where nothing is chosen, full pages lie side by side with the others and are read with them.
        scattered = read * size if routed else 0.0
        work = _plain(layer, batch, always + read * size, scattered, element)
    else:
        work = _with_codes(layer, contents, always, read, routed, dtype)
    if not routed:
        return work
    ranked = batch * counts.full
    kept = kept_bounds(layer, options)
    known, products = layer.kv_heads * (kept * 2 * element + (layer.bounds_dim - kept) * 3), 2
    if coded := key_codes_bytes(layer, options):
        known, products = coded, size
    return dataclasses.replace(
        work,
        bytes_read=work.bytes_read + ranked * known,
        flops=work.flops + 2 * products * ranked * layer.query_heads * layer.bounds_dim,
    )


def chosen_pages(full: float, options: PiKVConfig) -> float:
    """Return how many of a row's full pages a KV head reads in a step, at most."""
    if options.routing == "all":
        return full
    most = options.max_pages
    return min(full, most if isinstance(most, int) else math.ceil(full * most))


def _plain(layer: LayerShape, batch: int, tokens: float, scattered: float, element: int) -> AttentionWork:
    per_token = layer.width * element
    products = batch * layer.query_heads * tokens
    return AttentionWork(
        bytes_read=batch * tokens * per_token,
        scattered_bytes=batch * scattered * per_token,
        coded=(),
        flops=2 * products * (layer.key_dim + layer.value_dim),
        logits=products,
    )


def _with_codes(
    layer: LayerShape, contents: CacheContents, always: float, read: float, routed: bool, dtype: str
) -> AttentionWork:
    """Return what a step reads of `always` tokens as they came and `read` packed pages of each row."""
    batch, options = contents.batch, contents.options
    element, pages = DTYPE_BYTES[dtype], batch * read
    work = _plain(layer, batch, always, 0.0, element)
    stored = pages * packed_page_bytes(layer, options, dtype) / (layer.key_dim + layer.value_dim)
    tokens, coded, as_they_are, dims = pages * options.page_size, [], 0.0, 0
    for name, dim in ((options.key_codec, layer.key_dim), (options.value_codec, layer.value_dim)):
        if name in ("none", "lowrank"):
            # Coefficients of a low-rank basis, and numbers as they came, are read like any others.
            as_they_are, dims = as_they_are + stored * dim, dims + dim
        else:
            kernel = "int4" if name == "auto" else name
            numbers = tokens * layer.kv_heads * dim
            coded.append((kernel, numbers, stored * dim, 2 * tokens * layer.query_heads * dim))
    return dataclasses.replace(
        work,
        bytes_read=work.bytes_read + as_they_are,
        scattered_bytes=stored * (layer.key_dim + layer.value_dim) if routed else 0.0,
        coded=tuple(coded),
        flops=work.flops + 2 * tokens * layer.query_heads * dims,
        logits=work.logits + (tokens * layer.query_heads if dims else 0.0),
    )
