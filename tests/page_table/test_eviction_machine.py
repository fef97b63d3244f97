"""Random sequences of evictions among appending, cropping, forking and reordering, against dense masked attention."""

from eviction_machine import EvictionMachine
from hypothesis import settings

EvictionMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20)
TestEvictionMachine = EvictionMachine.TestCase
