"""PiKV for Hugging Face: an expert-sharded, paged KV cache for Mixture-of-Experts models."""

from .attachment import attach, detach
from .cache import PiKVCache
from .config import PiKVConfig
from .report import MemoryReport
from .version import __version__

__all__ = ["MemoryReport", "PiKVCache", "PiKVConfig", "__version__", "attach", "detach"]
