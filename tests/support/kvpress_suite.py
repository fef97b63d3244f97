"""A pytest plugin that runs kvpress's own tests, in a clone of it, without network and on another cache.

    cd KVPRESS
    PYTHONPATH=$PWD:PIKV/tests/support KVPRESS_CACHE=config PIKV/.venv/bin/pytest -p kvpress_suite tests

`KVPRESS_CACHE` is `dynamic` for `DynamicCache`, to see what passes without network at all, `config` for a cache made
from a config alone, or `attached`. Some tests do not hold for attached caches, by intent: their `get_seq_length()` goes
on counting evicted tokens, and marks of head-wise presses are cleared once what they mark is evicted.
"""

import os
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import kvpress.pipeline
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from transformers import DynamicCache

from pikv_hf import PiKVCache

KIND = os.environ.get("KVPRESS_CACHE", "config")
FOLDER = tempfile.TemporaryDirectory()
NAME = "maxjeblick/llama2-0b-unit-test"
TEXT = (
    "This is a test article. It was written on 2022-01-01. When was this article written? The quick brown fox jumps "
    "over the lazy dog. What animal jumps over the dog?"
)
CONFIG = transformers.LlamaConfig(
    vocab_size=3500,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=4096,
    dtype="float32",
)
_models: list[torch.nn.Module] = []


def save_model() -> None:
    """Save a tiny model, and a tokenizer that makes as many tokens of kvpress's sentences as Llama's, where it is."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(FOLDER.name)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    model.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    model.train_from_iterator([TEXT] * 2, trainers.BpeTrainer(vocab_size=3500, min_frequency=1, **options))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": special[0], "bos_token": special[1], "eos_token": special[2], "pad_token": special[0]}
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names).save_pretrained(FOLDER.name)


def load_locally(auto: Any) -> None:
    """Have one of transformers' classes find the tiny model under the name of kvpress's."""
    original = auto.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cls, FOLDER.name if str(name).lower() == NAME else name, *args, **kwargs)
        if isinstance(made, torch.nn.Module):
            _models.append(made)
            made.register_forward_pre_hook(attach_cache, with_kwargs=True)
        return made

    auto.from_pretrained = classmethod(from_pretrained)


def attach_cache(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Make an empty cache, of which only the config was known, the attached one of the model that it comes to."""
    cache = kwargs.get("past_key_values")
    if KIND == "attached" and isinstance(cache, PiKVCache) and cache.attachment is None and not cache.get_seq_length():
        cache.__dict__.update(PiKVCache.for_model(model, placement="hash").__dict__)


def pytest_configure() -> None:
    save_model()
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer, transformers.AutoConfig):
        load_locally(auto)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for model in _models:
        # An adapter of an earlier test froze it: gradients would be needed no more.
        model.requires_grad_(True)
    if KIND == "dynamic":
        return
    for module in (kvpress.pipeline, getattr(item, "module", None)):
        if getattr(module, "DynamicCache", None) is DynamicCache:
            module.DynamicCache = lambda: PiKVCache(CONFIG)
