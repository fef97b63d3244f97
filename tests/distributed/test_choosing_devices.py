"""Which devices a cache is spread over, and which share each gets."""

from typing import Any

import pytest
import torch
from device_runs import SMALL, shared_model
from press_runs import ids_of, read

from pikv_hf import PiKVCache
from pikv_hf.distributed.device_layout import PartLocation, find_devices


def devices_of(devices: Any, max_memory: Any = None) -> tuple[tuple[str, ...], tuple[float, ...]]:
    found = find_devices(devices, max_memory)
    return found.names, found.weights


def with_accelerators(monkeypatch: pytest.MonkeyPatch, free: dict[Any, int]) -> None:
    """Let accelerate and torch see some GPUs."""

    def get_max_memory(max_memory: Any = None) -> dict[Any, int]:
        from accelerate.utils import convert_file_size_to_int

        given = free if max_memory is None else max_memory
        return {key: convert_file_size_to_int(value) for key, value in given.items()}

    monkeypatch.setattr("accelerate.utils.get_max_memory", get_max_memory)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: sum(isinstance(key, int) for key in free))
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))


def test_auto_without_accelerators() -> None:
    assert devices_of("auto") == (("cpu",), (1.0,))
    cache = PiKVCache.for_model(shared_model(), devices="auto", **SMALL)
    assert [layer.layout.locations for layer in cache.layers] == [(PartLocation(0, None, "cpu"),)] * 2


def test_auto_takes_what_accelerate_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    with_accelerators(monkeypatch, {0: 10 * 2**30, 1: 30 * 2**30, "cpu": 64 * 2**30})
    assert devices_of("auto") == (("cuda:0", "cuda:1"), (10 * 2.0**30, 30 * 2.0**30))
    assert devices_of("auto", {0: "1GiB", 1: "2GiB"}) == (("cuda:0", "cuda:1"), (2.0**30, 2.0**31))
    assert devices_of("auto", {0: "1GiB", "cpu": 2**30}) == (("cuda:0", "cpu"), (2.0**30, 2.0**30))
    assert devices_of("auto", {1: "1GiB", "disk": 5}) == (("cuda:1",), (2.0**30,))
    # The logical devices of the CPU divide its memory.
    assert devices_of(["cuda:1", "cpu:0", "cpu:1"])[1] == (30 * 2.0**30, 32 * 2.0**30, 32 * 2.0**30)
    assert devices_of([0, torch.device("cuda", 1)])[0] == ("cuda:0", "cuda:1")
    assert devices_of(["cuda"])[0] == ("cuda:0",)
    with pytest.raises(ValueError, match="device 'cuda:2' is not there: 2 devices of type 'cuda'"):
        find_devices(["cuda:2"], None)


def test_shares_follow_the_memory() -> None:
    model = shared_model()
    given = {"cpu:0": "1GiB", "cpu:1": "3GiB", "cpu:2": 0}
    cache = PiKVCache.for_model(model, devices=list(given), max_memory=given, **SMALL)
    read(model, cache, ids_of(1000))
    for layer in cache.layers:
        layer.settle()
        held = [sum(report.shard_tokens) for report in cache.memory_report().layers if report.layer == layer.layer_idx]
        assert held[2] == 0
        assert abs(held[1] / sum(held) - 0.75) < 0.05


def test_a_home_that_is_not_among_the_devices() -> None:
    """The window is with the layer's attention, the shards are not."""
    found = find_devices(["cpu:0", "cpu:1"], {"cpu:0": 1, "cpu:1": 3})
    layout = found.around(torch.device("cuda", 0))
    assert layout.weights == (0.0, 1.0, 3.0)
    assert layout.locations == (
        PartLocation(0),
        PartLocation(1, torch.device("cpu", 0), "cpu:0"),
        PartLocation(2, torch.device("cpu", 1), "cpu:1"),
    )
    home = found.around(torch.device("cpu"))
    assert home.weights == (1.0, 3.0)
    assert [location.name for location in home.locations] == ["cpu:0", "cpu:1"]


def test_the_home_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with_accelerators(monkeypatch, {0: 4, 1: 5, 2: 6, "cpu": 7})
    layout = find_devices("auto", None).around(torch.device("cuda", 1))
    assert [location.name for location in layout.locations] == ["cuda:1", "cuda:0", "cuda:2"]
    assert layout.weights == (5.0, 4.0, 6.0)
    assert layout.locations[0].device is None
    # A device without a number is the first of its type.
    assert find_devices([0, 1], None).around(torch.device("cuda")).locations[0].name == "cuda:0"


@pytest.mark.parametrize(
    ("devices", "max_memory", "error", "message"),
    [
        ("cuda", None, ValueError, "devices must be \"auto\" or a list of devices, got 'cuda'"),
        (2, None, TypeError, 'devices must be "auto" or a list of devices, got 2'),
        ([], None, ValueError, "devices must name at least one device, got an empty list"),
        (["cpu", "cpu"], None, ValueError, 'device \'cpu\' is named 2 times; parts on one CPU are "cpu:0", "cpu:1"'),
        (["cpu:1", "cpu:0", "cpu:1"], None, ValueError, "device 'cpu:1' is named 2 times$"),
        (["cuda:7"], None, ValueError, "device 'cuda:7' is not there: 0 devices of type 'cuda'"),
        ([3], None, ValueError, "device 'cuda:3' is not there: 0 devices"),
        (["mps"], None, ValueError, "device 'mps:0' is not there: 0 devices of type 'mps'"),
        (["gpu:0"], None, ValueError, "'gpu:0' is no device that torch knows: Expected one of cpu, cuda"),
        (["cuda:-1"], None, ValueError, "'cuda:-1' is no device that torch knows"),
        (["cpu", "disk"], None, ValueError, "cannot compute on the device 'disk'"),
        ([True], None, TypeError, "a device must be a name, a number or a torch.device, got True"),
        ([None], None, TypeError, "got None"),
        (["cpu:0", "cpu:1"], {"cpu:0": 5}, ValueError, "max_memory says nothing of 'cpu:1', only of cpu:0"),
        (["cpu:0"], {"cpu:0": 0}, ValueError, r"devices cpu:0 have no memory to give: \(0.0,\)"),
        (["cpu:0"], {"cpu:0": "much"}, ValueError, "got 'much' for 'cpu:0'"),
        (["cpu:0"], {"cpu:0": None}, TypeError, "got None for 'cpu:0'"),
        (["cpu:0"], {"cpu:0": 1.5}, TypeError, "got 1.5 for 'cpu:0'"),
        (["cpu:0"], {"cpu:0": -5}, ValueError, "-5"),
        ("auto", ["cpu"], TypeError, r"max_memory must be a mapping from devices to bytes, got \['cpu'\]"),
        (None, {"cpu": 5}, ValueError, "max_memory={'cpu': 5} divides shards among devices; give devices=\"auto\""),
    ],
    ids=str,
)
def test_devices_that_cannot_be(devices: Any, max_memory: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PiKVCache.for_model(shared_model(), devices=devices, max_memory=max_memory, **SMALL)


def test_devices_and_processes_at_once() -> None:
    with pytest.raises(ValueError, match=r"give either devices or process_group, got devices=\['cpu'\]"):
        PiKVCache.for_model(shared_model(), devices=["cpu"], process_group="world")
