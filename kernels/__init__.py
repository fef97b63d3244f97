"""Operations on paged K/V: pure functions on tensors that know nothing of models or caches.

Shapes are written with B cache rows, H KV heads, G query heads per KV head, Q queries, T tokens, N pages, P tokens per
page, D and Dv head dims of keys and values.
"""

from .append_newest import append_newest, expert_writer, newest_writer
from .append_tokens import append_tokens
from .decode_pages import decode_pages
from .encode_pages import encode_pages
from .gather_pages import gather_dense, gather_pages
from .merge_partials import merge_pair, merge_partials
from .page_masses import page_masses
from .page_scores import page_scores
from .paged_decode_attention import paged_decode_attention
from .partial_attention import causal_attention, partial_attention

# With the repository root on sys.path this folder hides Hugging Face's `kernels` package. A version below any real
# one makes transformers' check answer "not available" instead of raising on an unparsable version.
__version__ = "0.0.0"

__all__ = [
    "append_newest",
    "append_tokens",
    "causal_attention",
    "decode_pages",
    "encode_pages",
    "expert_writer",
    "gather_dense",
    "gather_pages",
    "merge_pair",
    "merge_partials",
    "newest_writer",
    "page_masses",
    "page_scores",
    "paged_decode_attention",
    "partial_attention",
]
