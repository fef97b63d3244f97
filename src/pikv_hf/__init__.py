"""PiKV for Hugging Face: an expert-sharded, paged KV cache for Mixture-of-Experts models."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .cache import PiKVCache
    from .config import PiKVConfig
    from .integration.attachment import attach, detach
    from .reports.memory_report import MemoryReport
    from .store.context_store import ContextStore

__all__ = ["ContextStore", "MemoryReport", "PiKVCache", "PiKVConfig", "__version__", "attach", "detach"]

_MODULES = {
    "ContextStore": "store.context_store",
    "MemoryReport": "reports.memory_report",
    "PiKVCache": "cache",
    "PiKVConfig": "config",
    "attach": "integration.attachment",
    "detach": "integration.attachment",
}


def __getattr__(name: str) -> Any:
    # The kernels need torch alone and are used where transformers may be missing or of another version.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
