"""Presses for any cache: `with press(model): model.generate(..., past_key_values=cache)`, or kvpress's pipeline.

They work on any cache of transformers and within kvpress's wrappers; on an attached :class:`~pikv_hf.PiKVCache` what
they evict or narrow is really freed, head by head. A method has a file of its own, `*_press.py`; the other files are
what several share. They may import the core and the kernels. In come a layer's keys, values and observed queries; out
goes, for each token of each KV head, whether it stays and in how many bits.

They need no kvpress. Where it is installed they are its presses, and its own are adapted to the release of transformers
(:mod:`~pikv_hf.presses.kvpress_adapter`).
"""

from pikv_hf.presses import kvpress_adapter
from pikv_hf.presses.duo_press import DuoPress
from pikv_hf.presses.expert_press import ExpertPress
from pikv_hf.presses.lora_press import LoRAPress
from pikv_hf.presses.pikv_press import PiKVPress
from pikv_hf.presses.pyramid_press import PyramidPress
from pikv_hf.presses.query_aware_press import QueryAwarePress
from pikv_hf.presses.rowwise_press import RowwisePress

kvpress_adapter.install()

__all__ = ["DuoPress", "ExpertPress", "LoRAPress", "PiKVPress", "PyramidPress", "QueryAwarePress", "RowwisePress"]
