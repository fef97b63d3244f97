"""``pikv demo`` from the command line down: results, exit statuses, messages."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from pikv_hf import PiKVCache
from pikv_hf.eval.cli.main import app
from pikv_hf.eval.demo import demo
from pikv_hf.eval.demo.caches import CacheKind, pikv_cache
from pikv_hf.eval.demo.measure import Answer, first_difference, total_bytes
from pikv_hf.eval.reference.tokenizer import build_tokenizer

pytestmark = pytest.mark.slow

LAYERS, EXPERTS = 2, 8
CACHES = ("dynamic", "pikv", "int4", "press")
SHORT = ("--tokens", "600", "--max-new-tokens", "6")


@pytest.fixture(autouse=True)
def _threads():
    """The demo sets torch's thread count; other tests of this process keep theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def save_tiny(folder: Path, chat_template: str | None = None) -> str:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        intermediate_size=16,
        max_position_embeddings=1024,
        # Large weights, so that attention decides what is written.
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text("The grass is green. The sky is blue. " * 20)
    return str(file)


def run(*arguments: str, status: int = 0):
    result = CliRunner().invoke(app, ["demo", "--threads", "1", *arguments])
    assert result.exit_code == status, result.output
    return result


def run_json(*arguments: str, status: int = 0) -> dict:
    # One JSON object and nothing else, or this raises.
    return json.loads(run(*arguments, "--json", status=status).stdout)


def right_answers(cache: dict) -> int:
    return sum(answer["right"] for answer in cache["answers"])


def test_bundled_model_answers_with_every_cache():
    found = run_json()
    dynamic = found["dynamic"]
    assert found["agree"]
    assert found["context_tokens"] == pytest.approx(2048, rel=0.01)
    assert [found[name]["cache"] for name in CACHES] == ["DynamicCache", "PiKVCache", "int4", "PiKVPress"]
    assert right_answers(found["pikv"]) >= 5
    assert right_answers(found["int4"]) >= 5
    assert right_answers(found["press"]) >= 5
    assert found["press_missing"] is None
    # One copy of the text for all questions; about a quarter of its bytes; a sixteenth.
    assert found["pikv"]["open_bytes"] < 0.3 * dynamic["open_bytes"]
    assert found["int4"]["context_bytes"] < 0.3 * dynamic["context_bytes"]
    assert found["press"]["context_bytes"] <= dynamic["context_bytes"] / 16
    assert found["press"]["open_bytes"] < dynamic["open_bytes"] / 16


def test_json_of_another_model(tiny):
    found = run_json("--model", tiny, *SHORT)
    dynamic, pikv = found["dynamic"], found["pikv"]
    assert found["agree"]
    assert found["logit_difference"] < 1e-3
    assert [a["token_ids"] for a in dynamic["answers"]] == [a["token_ids"] for a in pikv["answers"]]
    assert all(answer["right"] is False for answer in pikv["answers"])
    assert {len(found[name]["answers"]) for name in CACHES} == {len(found["questions"])} == {6}
    assert pikv["open_bytes"] < dynamic["open_bytes"]


def test_dynamic_bytes_are_those_of_its_tensors(tiny):
    found = run_json("--model", tiny, *SHORT)
    kv_heads, head_dim, float32 = 2, 16, 4
    assert found["dynamic"]["context_bytes"] == found["context_tokens"] * LAYERS * 2 * kv_heads * head_dim * float32


def test_every_token_of_the_context_is_in_one_shard_or_the_window(tiny):
    found = run_json("--model", tiny, "--page-size", "8", "--recent-window", "16", "--num-shards", "3", *SHORT)
    assert len(found["spread"]) == LAYERS
    for layer in found["spread"]:
        assert len(layer["shard_tokens"]) == 3
        assert len(layer["expert_tokens"]) == EXPERTS
        assert sum(layer["shard_tokens"]) + layer["window_tokens"] == found["context_tokens"]
        assert sum(layer["expert_tokens"]) == found["context_tokens"]


def test_hash_placement_follows_no_expert(tiny):
    found = run_json("--model", tiny, "--placement", "hash", *SHORT)
    assert found["agree"]
    assert [layer["expert_tokens"] for layer in found["spread"]] == [[]] * LAYERS


def test_tiers_move_pages_and_change_no_answer(tiny):
    found = run_json("--model", tiny, *SHORT, "--page-size", "8", "--tiers", "cpu=96KiB,disk")
    assert found["agree"]
    tiers = found["stats"]["tiers"]
    assert found["press_missing"] is None
    assert tiers["limits"] == {"cpu": 96 * 1024, "disk": None}
    assert tiers["pages"]["disk"] > 0 < tiers["bytes_moved"]["disk->cpu"]
    shown = run("--model", tiny, *SHORT, "--page-size", "8", "--tiers", "cpu=96KiB,disk")
    assert "Tiers" in shown.stdout
    assert "96.0 KiB" in shown.stdout


def test_unknown_tiers_are_refused(tiny):
    assert "'ram'" in run("--model", tiny, *SHORT, "--tiers", "ram=1MiB", status=2).output


def test_shards_on_several_devices_change_no_answer(tiny):
    arguments = ("--model", tiny, *SHORT, "--page-size", "8", "--cache-devices", "cpu:0,cpu:1")
    found = run_json(*arguments)
    assert found["agree"]
    assert found["press_missing"] is None
    assert set(found["per_device"]) == {"cpu:0", "cpu:1"}
    assert min(found["per_device"].values()) > 0.3 * sum(found["per_device"].values())
    for layer in found["spread"]:
        assert sum(layer["shard_tokens"]) + layer["window_tokens"] == found["context_tokens"]
        assert sum(layer["expert_tokens"]) == found["context_tokens"]
    assert "Memory by device" in run(*arguments).stdout


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<bos>VAR {{ m.content }} here\n{% endfor %}"])
def test_own_text(tmp_path, text, template):
    model = save_tiny(tmp_path / "model", template)
    found = run_json("--model", model, "--text", text, "--question", "Where is it?", "--question", "What?", *SHORT)
    assert found["agree"]
    assert found["questions"] == ["Where is it?", "What?"]
    assert found["expected"] == [None, None]
    assert {answer["right"] for answer in found["pikv"]["answers"]} == {None}
    assert found["context_tokens"] == 202 + (template is not None)


@pytest.mark.parametrize("shards", ["8", "100"])
def test_tables_are_at_most_80_columns_wide(tiny, text, shards):
    for source in (SHORT, ("--text", text, "--question", "Where [is] it?")):
        shown = run("--model", tiny, "--num-shards", shards, *source).stdout
        assert max(map(len, shown.splitlines())) <= 80
        assert "same tokens for every question" in shown
        # Figures are cut or wrapped in no row.
        assert "…" not in shown


def test_last_lines_say_what_each_cache_is_good_for(tiny):
    *_, title, dynamic, pikv, int4, press = run("--model", tiny, *SHORT).stdout.rstrip().splitlines()
    assert title.strip() == "What each is good for"
    assert dynamic.startswith("DynamicCache  one question")
    assert re.match(r"PiKVCache     many questions, one text: same tokens, \d+\.\d% of the bytes\.", pikv)
    assert re.match(r"int4          longer texts: \d+\.\d% of the bytes, 0 of 6 answers right\.", int4)
    assert re.match(r"PiKVPress     the longest texts: \d+\.\d% of the bytes, 0 of 6 answers right\.", press)


def test_where_the_answer_is_not_known_caches_are_compared(tiny, text):
    shown = run("--model", tiny, "--text", text, "--question", "Where?", *SHORT).stdout
    assert "DynamicCache's answer" in shown
    assert re.search(r"the same +1 of 1 +1 of 1 +[01] of 1 +[01] of 1", shown)
    assert re.search(r"\d% of the bytes, [01] of 1 answers the same\.", shown)


def test_disagreement_is_reported_with_status_1(tiny, monkeypatch):
    def forgetful(model, config, devices):
        def copy(cache: PiKVCache) -> PiKVCache:
            for layer in cache.layers:
                layer.table.plain.values.zero_()
            return cache.fork()

        return CacheKind("PiKVCache", pikv_cache(model, config, devices).make, copy)

    monkeypatch.setattr(demo, "pikv_cache", forgetful)
    result = run("--model", tiny, "--json", *SHORT, status=1)
    found = json.loads(result.stdout)
    assert not found["agree"]
    assert found["disagreements"][0]["question"] == 0
    assert "answers differ for" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--page-size", "0"), "page_size must be at least 1, got 0"),
        (("--placement", "experts"), "placement must be one of 'expert', 'balanced', 'hash', got 'experts'"),
        (("--dtype", "int8"), "--dtype must be one of float32, float16, bfloat16, got 'int8'"),
        (("--device", "abacus"), "cannot use --device abacus"),
        (("--threads", "0"), "--threads must be at least 1, got 0"),
        (("--tokens", "10"), "no haystack of --tokens 10"),
        (("--tokens", "3000"), "has 1024 positions"),
        (("--question", "Why?"), "--question needs --text"),
        (("--text", "absent.txt"), "--text absent.txt needs at least one --question"),
        (("--text", "absent.txt", "--question", "Why?"), "cannot read --text absent.txt: No such file"),
        (("--model", "./absent"), "cannot load --model ./absent: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tiny, arguments, message):
    result = run("--model", tiny, *arguments, status=2)
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout


def test_empty_text_is_refused(tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    result = run("--model", tiny, "--text", str(tmp_path / "empty.txt"), "--question", "Why?", status=2)
    assert "is empty" in result.stderr


def test_folder_without_model_is_refused(tmp_path):
    assert f"cannot load --model {tmp_path}" in run("--model", str(tmp_path), status=2).stderr


def test_unknown_option_has_status_2():
    run("--pages", "3", status=2)


def test_total_bytes_counts_shared_storages_once(tiny):
    model = Qwen3MoeForCausalLM.from_pretrained(tiny)
    cache = PiKVCache.for_model(model)
    with torch.no_grad():
        model(torch.arange(300)[None], past_key_values=cache)
    assert total_bytes([cache]) == cache.nbytes
    # A second fork adds its page numbers only.
    assert total_bytes([cache, cache.fork()]) < cache.nbytes * 1.01


@pytest.mark.parametrize(
    ("one", "other", "expected"), [((1, 2), (1, 2), None), ((1, 2), (1, 3), 1), ((1,), (1, 2), 1), ((), (1,), 0)]
)
def test_first_difference(one, other, expected):
    assert first_difference(Answer("", one, None), Answer("", other, None)) == expected
