"""Prompts that begin alike, for stores of contexts."""

from typing import Any

import torch
from families import VOCAB

OPTIONS: dict[str, Any] = {"page_size": 8, "recent_window": 16, "sink_tokens": 2, "num_shards": 3}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def ids(length: int, seed: int) -> torch.Tensor:
    """Return random token ids, `(1, length)`."""
    return torch.randint(2, VOCAB - 1, (1, length), generator=torch.Generator().manual_seed(seed))


def joined(*parts: torch.Tensor) -> torch.Tensor:
    """Return pieces of a prompt as one."""
    return torch.cat(parts, dim=1)


FIRST, SECOND, OTHER = ids(40, 1), ids(30, 2), ids(30, 3)
