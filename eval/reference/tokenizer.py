"""Build the reference model's tokenizer: one token per word, digit, newline or punctuation mark.

Spaces are not tokens; the decoder puts them back by rule, so token ids survive ids -> text -> ids unchanged.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pikv_hf.eval.reference.synthetic import text
from pikv_hf.eval.reference.synthetic.words import FILLERS, KEYS

PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
DIGITS = "0123456789"
PUNCTUATION = ".,:=?!'()-"

# A space separates two tokens unless it stands before closing punctuation, next to a newline, inside a number,
# inside parentheses, or after <bos>.
_NEEDLESS_SPACE = r" (?=[.,:?!)\n]|\( s \))|(?<=[\n(]) |(?<=\d) (?=\d)|(?<=<bos>) | (?=<eos>)"


def _template_sentences() -> Iterable[str]:
    """Every fixed sentence of the tasks."""
    yield from text.NOISE_SENTENCES
    yield from (text.PREAMBLE_ONE, text.PREAMBLE_MANY, text.PREAMBLE_VARIABLES)
    yield text.needle("", "") + text.assignment("", "") + text.alias("", "") + text.enumerate_words([""] * 3)
    for question in (text.ask_one(""), text.ask_all([""]), text.ask_variable("")):
        yield " ".join(question)


def vocabulary() -> dict[str, int]:
    """Token to id: special tokens first, then newline, digits, punctuation, template words, keys and fillers."""
    words = [word for sentence in _template_sentences() for word in text.split_tokens(sentence)]
    tokens = [*SPECIAL_TOKENS, "\n", *DIGITS, *PUNCTUATION, *words, *KEYS, *FILLERS]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from the word lists; the same lists always give the same ids.

    Calling it adds ``<bos>``; pass ``add_special_tokens=False`` for a text that continues another.
    """
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(text.TOKEN_PATTERN), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [
            # A word-piece decoder whose continuation mark never occurs puts a space before every token but the first.
            decoders.WordPiece(prefix="\0", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(_NEEDLESS_SPACE), ""),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, wrapped.bos_token_id)]
    )
    return wrapped
