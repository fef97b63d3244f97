"""What a process that another one has started does with saved caches: it loads the files and goes on."""

from pathlib import Path
from typing import Any

import torch
from saved_runs import go_on, shared_model

from pikv_hf import PiKVCache


def load_and_go_on(paths: list[Path], results: Any) -> None:
    """Put the tokens that each loaded cache goes on with into a queue, or the error."""
    torch.set_num_threads(1)
    model = shared_model()
    for path in paths:
        try:
            results.put(go_on(model, PiKVCache.load(path, model)).argmax(-1).tolist())
        except Exception as error:
            results.put(repr(error))
