"""Models that accelerate dispatches, their weights offloaded: the same tokens, shards on several devices."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook
from families import FAMILIES, prompts
from transformers import DynamicCache

from pikv_hf import PiKVCache
from pikv_hf.distributed.device_layout import attention_device
from pikv_hf.layer.layer import PiKVLayer

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"page_size": 8, "recent_window": 16, "num_shards": 4}
DEVICES = ["cpu:0", "cpu:1"]
CPU = torch.device("cpu")


def device_map(model: Any, places: list[str]) -> dict[str, str]:
    """Return a device map: the parts of a model one after another at these places, over and over."""
    names = [
        "model.embed_tokens",
        *(f"model.layers.{n}" for n in range(len(model.model.layers))),
        "model.norm",
        "lm_head",
    ]
    names += [f"model.{name}" for name, _ in model.model.named_children() if name.startswith("rotary")]
    return {name: places[index % len(places)] for index, name in enumerate(names)}


def offloaded(model: Any, how: str, folder: Path) -> Any:
    """Return the model with its weights where `how` says, brought to the CPU only to compute."""
    if how == "cpu":
        return cpu_offload(model, execution_device=CPU)
    if how == "disk":
        return disk_offload(model, str(folder), execution_device=CPU)
    places = {"map": ["cpu"], "map to disk": ["disk"], "map to both": ["cpu", "disk"]}[how]
    return dispatch_model(
        model, device_map(model, places), main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def hooks_of(model: Any) -> list[AlignDevicesHook]:
    found = []
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        found += [each for each in (hook, *getattr(hook, "hooks", ())) if isinstance(each, AlignDevicesHook)]
    return found


def generate(model: Any, cache: Any, **options: Any) -> Any:
    options = {"max_new_tokens": 16, "do_sample": False, "output_logits": True, **options}
    return model.generate(**prompts(), past_key_values=cache, return_dict_in_generate=True, **options)


# DeepSeek-V2 is not among them: once accelerate has offloaded it, transformers' own cache gives other tokens too.
@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("mixtral", "cpu"),
        ("mixtral", "disk"),
        ("mixtral", "map"),
        ("mixtral", "map to disk"),
        ("qwen3_moe", "map to both"),
        ("gpt_oss", "disk"),
    ],
)
def test_the_tokens_of_a_dispatched_model(family: str, how: str, tmp_path: Path) -> None:
    model = FAMILIES[family].build(**({} if family == "gpt_oss" else {"num_hidden_layers": 2}))
    expected = generate(model, DynamicCache(config=model.config))
    model = offloaded(model, how, tmp_path)
    assert hooks_of(model)
    assert any(hook.offload for hook in hooks_of(model)) == (how != "map")
    if how == "disk":
        assert next(model.parameters()).device.type == "meta"
        assert list(tmp_path.iterdir())
    cache = PiKVCache.for_model(model, devices=DEVICES, **SMALL)
    ours = generate(model, cache)
    assert torch.equal(ours.sequences, expected.sequences)
    for step, (a, b) in enumerate(zip(ours.logits, expected.logits, strict=True)):
        assert (a - b).abs().max() <= 1e-4, f"step {step}"
    paged = [layer for layer in cache.layers if isinstance(layer, PiKVLayer)]
    assert all(layer.layout.parts == 2 for layer in paged)
    stored = {device: held for device, held in cache.memory_report().per_device.items() if device in DEVICES}
    assert set(stored) == set(DEVICES)
    assert all(sum(report.shard_tokens) > 0 for report in cache.memory_report().layers if report.device in DEVICES)


def test_a_dispatched_model_goes_on(tmp_path: Path) -> None:
    """Beams, another turn, a crop and a fork, with weights on disk."""
    model = FAMILIES["qwen3_moe"].build(num_hidden_layers=2)
    theirs = DynamicCache(config=model.config)
    beams = generate(model, DynamicCache(config=model.config), num_beams=3, output_logits=False).sequences
    first = generate(model, theirs).sequences
    turn = torch.cat([first, prompts(seed=5)["input_ids"][:, -20:]], dim=1)
    mask = torch.cat([prompts()["attention_mask"], torch.ones_like(turn[:, 75:])], dim=1)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    second = model.generate(turn, past_key_values=theirs, **options)
    model = offloaded(model, "map to both", tmp_path)
    assert torch.equal(
        generate(
            model, PiKVCache.for_model(model, devices=DEVICES, **SMALL), num_beams=3, output_logits=False
        ).sequences,
        beams,
    )
    cache = PiKVCache.for_model(model, devices=DEVICES, **SMALL)
    assert torch.equal(generate(model, cache).sequences, first)
    fork = cache.fork()
    assert torch.equal(model.generate(turn, past_key_values=fork, **options), second)
    assert torch.equal(model.generate(turn, past_key_values=cache, **options), second)
    cache.crop(75)
    fork.crop(75)
    assert cache.get_seq_length() == 75
    assert torch.equal(model.generate(turn, past_key_values=cache, **options), second)


class Weightless(torch.nn.Module):
    """A module whose weights are elsewhere, with the hooks of accelerate given."""

    def __init__(self, *hooks: Any) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2, device="meta")
        if hooks:
            self.inner._hf_hook = hooks[0] if len(hooks) == 1 else type("Hooks", (), {"hooks": hooks})()


def test_where_attention_computes() -> None:
    model = FAMILIES["mixtral"].build()
    module = model.model.layers[0].self_attn
    assert attention_device(module, model) == CPU
    assert attention_device(None, model) == CPU
    assert attention_device(Weightless(), model) == CPU
    assert attention_device(Weightless(AlignDevicesHook(execution_device=1)), model) == torch.device("cuda", 1)
    assert attention_device(Weightless(AlignDevicesHook(execution_device="cuda:2")), model) == torch.device("cuda", 2)
    several = Weightless(AlignDevicesHook(), AlignDevicesHook(execution_device=torch.device("cuda", 3)))
    assert attention_device(several, model) == torch.device("cuda", 3)
    # What is loaded says it by itself.
    loaded = Weightless(AlignDevicesHook(execution_device=1))
    loaded.here = torch.nn.Linear(2, 2)
    assert attention_device(loaded, model) == CPU
