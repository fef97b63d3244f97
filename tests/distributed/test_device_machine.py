"""Random sequences of operations on layers in several parts, against dense masked attention."""

import pytest
from device_machine import DeviceMachine
from hypothesis import settings

pytestmark = pytest.mark.slow

DeviceMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20)
TestDeviceMachine = DeviceMachine.TestCase
