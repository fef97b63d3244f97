"""Turn a GGUF file of the llama architecture into a folder that transformers loads like any other."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pikv_hf.common.extras import extra
from pikv_hf.eval.reference.load import no_progress_bar

#: What the file calls tokens that are no text.
_CONTROL = 3
#: Whether this transformers can leave the weights of such files quantised.
_KEEPS_BLOCKS = hasattr(transformers, "GgufConfig")


def convert(weights: Path, folder: Path) -> None:
    """Write config, float32 weights, tokenizer and chat template of a GGUF file.

    The tokenizer is made of the file's own vocabulary and merges. transformers 5.2 takes it for CodeLlama's: it would
    put a beginning-of-text token before every text, which this model has not seen, and call that the end of a text.

    Parameters
    ----------
    weights : Path
        The file.
    folder : Path
        Where to write; it is made.

    Raises
    ------
    MissingExtraError
        If the package that reads such files is missing.
    """
    with extra("real", "converting a GGUF file"):
        from gguf import GGUFReader
    fields = GGUFReader(weights).fields
    # A bar of its own is drawn by what reads the weights.
    with no_progress_bar(), contextlib.redirect_stderr(io.StringIO()):
        _model(weights).save_pretrained(folder)
    _tokenizer({name: field.contents() for name, field in fields.items()}).save_pretrained(folder)


def _model(weights: Path) -> PreTrainedModel:
    """Return the float32 model of a GGUF file, as one that was never quantised: newer transformers save no other."""
    # Newer ones leave weights as they are in the file where they have kernels for them, unless told not to.
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _KEEPS_BLOCKS else {}
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32, **unpacked
    )
    if not hasattr(model.config, "quantization_config"):
        return model
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Return the byte-pair tokenizer that a file describes: GPT-2's, with every digit a word of its own."""
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == _CONTROL]
    )
    named = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
