"""Three kinds of tokenizer, trained on the RULER text, and samples that fit them."""

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pikv_hf.eval.reference.load import reference_model_path
from pikv_hf.eval.tasks.ruler import Haystack, generate
from pikv_hf.eval.tasks.ruler.words import vocabulary
from pikv_hf.eval.tasks.sample import EvalSample

CHAT = (
    "{{ bos_token }}{% for message in messages %}<user>\n{{ message['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<model>\n{% endif %}"
)
TOKENIZERS = ("reference", "bpe", "unigram")


def training_text() -> list[str]:
    return [*Haystack.bundled().sentences, *vocabulary()]


def train_bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, like the tokenizers of Llama 3 or Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    wrapped.chat_template = CHAT
    return wrapped


def train_unigram() -> PreTrainedTokenizerFast:
    """Unigram pieces that begin with a visible space, like SentencePiece's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=8000, unk_token="<unk>", special_tokens=["<unk>", "<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@cache
def tokenizer_named(name: str) -> Any:
    if name == "reference":
        return AutoTokenizer.from_pretrained(reference_model_path(), local_files_only=True)
    return train_bpe() if name == "bpe" else train_unigram()


@cache
def reference_samples(task: str, length: int = 4096, samples: int = 12) -> list[EvalSample]:
    return generate(tokenizer_named("reference"), length, samples, tasks=[task])
