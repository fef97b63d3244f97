"""The random operations of the layer machine, with the layer now and then saved, forgotten and loaded from its file."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from fake_attachment import FakeAttachment
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from layer_machine import LayerMachine

from pikv_hf.config import PiKVConfig
from pikv_hf.layer.layer import PiKVLayer
from pikv_hf.serialization.layer_loader import PagedLayerLoader
from pikv_hf.serialization.layer_writer import describe_layer
from pikv_hf.serialization.tensor_file import TensorFile
from pikv_hf.serialization.tensor_writer import write_tensors

KIND = {"format": "machine", "layout": "1"}


def saved_and_loaded(layer: PiKVLayer, **overrides: Any) -> PiKVLayer:
    """Return a new layer that holds what a file of this one holds."""
    layer.settle()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        description, groups = describe_layer(0, layer)
        write_tensors(path, {**KIND, "description": json.dumps(description)}, groups)
        with TensorFile(path, {name: [value] for name, value in KIND.items()}) as file:
            file.verify()
            saved = PagedLayerLoader(0, json.loads(file.metadata["description"]), file, overrides)
            assert saved.specs() == file.specs
            saved.check()
            loaded = PiKVLayer(0, PiKVConfig.from_dict({**layer.config.to_dict(), **overrides}), FakeAttachment())
            saved.restore(loaded, torch.device("cpu"))
    return loaded


class SavedLayerMachine(LayerMachine):
    @rule(which=st.integers(0, 9))
    def save_and_load(self, which: int) -> None:
        twin = self.pick(which)
        # What the router has just placed may be packed when it is settled.
        twin.layer.settle()
        self.contents_agree()
        keys_and_values = None if twin.layer.table is None else twin.layer.dense()
        twin.layer = saved_and_loaded(twin.layer)
        if keys_and_values is not None:
            assert all(torch.equal(old, new) for old, new in zip(keys_and_values, twin.layer.dense(), strict=True))


SavedLayerMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20)
TestSavedLayerMachine = SavedLayerMachine.TestCase
