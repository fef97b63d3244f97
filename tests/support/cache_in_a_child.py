"""What a process that another one has started does with a cache: it loads the file and goes on."""

from pathlib import Path
from typing import Any

import torch
from saved_runs import go_on, shared_model

from pikv_hf import PiKVCache


def load_and_go_on(path: Path, family: str, results: Any) -> None:
    """Put the tokens that a loaded cache goes on with into a queue, or the error."""
    torch.set_num_threads(1)
    model = shared_model(family)
    try:
        results.put(go_on(model, PiKVCache.load(path, model)).argmax(-1).tolist())
    except Exception as error:
        results.put(repr(error))
