"""kvpress-compatible presses: `with press(model): model.generate(..., past_key_values=cache)`, or kvpress's pipeline.

They work on any cache of transformers and within kvpress's wrappers; on an attached :class:`~pikv_hf.PiKVCache` what
they evict or narrow is really freed, head by head.
"""

import kvpress  # noqa: F401  Patches the attention functions it finds; PiKV's is registered after it.

from pikv_hf.presses.duo import DuoPress
from pikv_hf.presses.expert import ExpertPress
from pikv_hf.presses.lora import LoRAPress
from pikv_hf.presses.pikv import PiKVPress
from pikv_hf.presses.pyramid import PyramidPress
from pikv_hf.presses.query_aware import QueryAwarePress
from pikv_hf.presses.rowwise import RowwisePress

__all__ = ["DuoPress", "ExpertPress", "LoRAPress", "PiKVPress", "PyramidPress", "QueryAwarePress", "RowwisePress"]
