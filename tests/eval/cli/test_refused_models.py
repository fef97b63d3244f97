"""Models of all kinds given to the commands: they work, or one line says why not."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_lines import Outcome, run

from pikv_hf.eval.bench.press_prefill import PRESSES

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": None,
}
LATENT = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16}
LATENT |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LATENT |= {"first_k_dense_replace": 1, "moe_intermediate_size": 16}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "DeepseekV3": LATENT,
    "Jamba": HYBRID,
    "Mamba": {"state_size": 4},
    "Bloom": {"n_layer": 2, "n_head": 2},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, reference_model: tuple[Any, Any]) -> Path:
    root, (_, tokenizer) = tmp_path_factory.mktemp("models"), reference_model
    for name, own in MODELS.items():
        config = getattr(transformers, f"{name}Config")(**{**SIZES, "vocab_size": len(tokenizer), **own})
        torch.manual_seed(0)
        kind = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
        kind.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    transformers.AutoModelForCausalLM.from_pretrained(root / "Llama").save_pretrained(root / "no_tokenizer")
    return root


def evaluate(model: Path, output: Path, *more: str, suite: str = "ruler") -> Outcome:
    given = {"ruler": ["--task", "niah_single_1", "--max-new-tokens", "2"], "perplexity": ["--prefill", "100"]}[suite]
    sizes = ["--length", "512", "--samples", "1", "--quiet"]
    return run(["eval", suite, "--model", str(model), *sizes, *given, "--output", str(output), *more])


@pytest.mark.parametrize(
    ("cache", "suite"),
    [("dynamic", "ruler"), ("pikv:placement=hash", "ruler"), ("pikv:placement=hash", "perplexity")],
)
def test_dense_models_are_evaluated_with_a_press(saved: Path, tmp_path: Path, cache: str, suite: str) -> None:
    given = ["--cache", cache, "--press", "PiKVPress", "--ratio", "0.75"]
    outcome = evaluate(saved / "Llama", tmp_path, *given, suite=suite)
    assert (outcome.status, outcome.errors) == (0, "")
    [summary] = tmp_path.glob("*/summary.json")
    share = json.loads(summary.read_text())["cost"]["kv_share_prefill_dtype"]
    # On DynamicCache a press that treats heads apart only masks; here it frees pages, all but those that are not full.
    assert share == 1 if cache == "dynamic" else share < 0.8


@pytest.mark.parametrize(
    ("model", "given", "says"),
    [
        ("Llama", ["--cache", "pikv"], 'no router found in LlamaForCausalLM.*placement="hash"'),
        ("Llama", ["--press", "ExpertPress", "--ratio", "0.5"], "Expert 50%.*no router found in LlamaForCausalLM"),
        ("Llama", ["--press", "FinchPress", "--ratio", "0.5"], "Finch 50% on LlamaForCausalLM.*delimiter"),
        ("DeepseekV3", ["--press", "SnapKVPress", "--ratio", "0.5"], "SnapKV 50% on DeepseekV3.*'head_dim'"),
        ("Jamba", [], "JambaForCausalLM.*layers of type mamba"),
        ("Jamba", ["--cache", "pikv"], "layers of type mamba"),
        ("Mamba", [], "MambaForCausalLM"),
        ("Mamba", ["--cache", "pikv:placement=hash"], "cannot use cache 'pikv:placement=hash': Mamba"),
        ("Bloom", [], "BloomForCausalLM has no decoder named model"),
        ("T5", [], "T5Config"),
        ("no_tokenizer", [], "no tokenizer"),
    ],
)
def test_a_model_that_cannot_be_evaluated_is_named(
    saved: Path, tmp_path: Path, model: str, given: list[str], says: str
) -> None:
    outcome = evaluate(saved / model, tmp_path / "out", *given)
    assert (outcome.status, outcome.output) == (2, "")
    [line] = [line for line in outcome.errors.splitlines() if line.startswith("Error: ")]
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("press", PRESSES)
def test_presses_of_this_project_work_on_latent_attention(saved: Path, tmp_path: Path, press: str) -> None:
    assert evaluate(saved / "DeepseekV3", tmp_path, "--press", press, "--ratio", "0.5").status == 0


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00" * 64, b"[]"], ids=["empty", "cut off", "binary", "list"])
def test_a_damaged_model_is_one_line(
    saved: Path, tmp_path: Path, reference_model: tuple[Any, Any], damage: str, content: bytes
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / "Llama")
    model.save_pretrained(tmp_path / "model")
    reference_model[1].save_pretrained(tmp_path / "model")
    (tmp_path / "model" / damage).write_bytes(content)
    outcome = evaluate(tmp_path / "model", tmp_path / "out")
    assert outcome.status == 2
    assert [line[:7] for line in outcome.errors.splitlines()].count("Error: ") == 1
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_what_was_measured(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = os.fsync, [2]

    def fill_up(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    outcome = evaluate(saved / "Llama", tmp_path, "--samples", "3")
    assert (outcome.status, outcome.errors.count("\n")) == (1, 1)
    assert "No space left on device" in outcome.errors
    assert " samples are kept in " in outcome.errors
    [folder] = tmp_path.iterdir()
    assert [file.name for file in folder.iterdir()] == ["partial-0.jsonl"]
    monkeypatch.undo()
    assert evaluate(saved / "Llama", tmp_path, "--samples", "3").status == 0
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", "metrics.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"version": 99}'], ids=["empty", "cut off", "list", "other"])
def test_damaged_results_are_named(saved: Path, tmp_path: Path, name: str, content: str) -> None:
    assert evaluate(saved / "Llama", tmp_path).status == 0
    [file] = tmp_path.glob(f"*/{name}")
    file.write_text(content)
    report = run(["report", str(tmp_path), "--output", str(tmp_path / "page")])
    # Of the three, a page needs the summary alone.
    assert report.status == (2 if name == "summary.json" else 0)
    assert name != "summary.json" or name in report.errors
    again = evaluate(saved / "Llama", tmp_path)
    # Metrics have no fields of their own, only tasks.
    accepted = name == "metrics.json" and content.startswith('{"v')
    assert (again.status, again.errors.count("\n")) == ((0, 0) if accepted else (2, 1))
