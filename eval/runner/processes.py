"""Find the processes of this run: one, or those that `accelerate launch` or `torchrun` started."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Return accelerate's view of the processes, which is the same object each time.

    Several processes on a machine without a GPU talk through gloo; accelerate has to be told that they shall.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
