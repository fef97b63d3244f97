"""Operations on paged K/V: pure functions on tensors that know nothing of models or caches.

Shapes are written with B cache rows, H KV heads, G query heads per KV head, Q queries, T tokens, N pages, P tokens per
page, D and Dv head dims of keys and values.
"""

from .append_tokens import append_tokens
from .gather_pages import gather_dense, gather_pages
from .merge_partials import merge_pair, merge_partials
from .open_pages import open_pages
from .page_scores import page_scores
from .paged_decode_attention import paged_decode_attention
from .partial_attention import causal_attention, partial_attention
from .seal_pages import seal_pages

# With the repository root on sys.path this folder hides Hugging Face's `kernels` package. A version below any real
# one makes transformers' check answer "not available" instead of raising on an unparsable version.
__version__ = "0.0.0"

__all__ = [
    "append_tokens",
    "causal_attention",
    "gather_dense",
    "gather_pages",
    "merge_pair",
    "merge_partials",
    "open_pages",
    "page_scores",
    "paged_decode_attention",
    "partial_attention",
    "seal_pages",
]
