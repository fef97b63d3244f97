"""Random sequences of operations on PiKV layers and their forks, against a plain dense reference after every step."""

from hypothesis import settings
from layer_machine import LayerMachine

LayerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestLayerMachine = LayerMachine.TestCase
