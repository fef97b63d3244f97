"""The random operations of the device machine, with the layer now and then saved, forgotten and loaded."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from device_machine import DeviceMachine
from divided_caches import assert_equal_layers
from fake_attachment import FakeAttachment
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.serialization.layer_loader import PagedLayerLoader
from pikv_hf.serialization.layer_writer import describe_layer
from pikv_hf.serialization.tensor_file import TensorFile
from pikv_hf.serialization.tensor_writer import write_tensors

pytestmark = pytest.mark.usefixtures("few_tokens_count")

KIND = {"format": "machine", "layout": "1"}


def saved_and_loaded(layer: PiKVLayer) -> PiKVLayer:
    """Return a new layer of as many parts that holds what a file of this one holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer"
        description, groups = describe_layer(0, layer)
        write_tensors(path, {**KIND, "description": json.dumps(description)}, groups)
        with TensorFile(path, {name: [value] for name, value in KIND.items()}) as file:
            file.verify()
            saved = PagedLayerLoader(0, json.loads(file.metadata["description"]), file, {})
            assert saved.specs() == file.specs
            saved.check()
            loaded = PiKVLayer(0, layer.config, FakeAttachment(), layer.layout)
            saved.check_fits(loaded)
            saved.restore(loaded, torch.device("cpu"))
    return loaded


class SavedDeviceMachine(DeviceMachine):
    @rule(which=st.integers(0, 9))
    def save_and_load(self, which: int) -> None:
        twin = self.pick(which)
        twin.layer.settle()
        self.contents_agree()
        loaded = saved_and_loaded(twin.layer)
        assert_equal_layers(twin.layer, loaded)
        twin.layer = loaded


SavedDeviceMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=16)
TestSavedDeviceMachine = SavedDeviceMachine.TestCase
