"""Cut a text in its middle, as LongBench does with prompts that are too long."""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens, no special ones added."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def truncate_middle(text: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int, following: int = 0) -> str:
    """Keep the first and the last tokens of a text that is too long.

    Parameters
    ----------
    text : str
        Returned as it is if it fits.
    tokenizer : PreTrainedTokenizerBase
        Counts the tokens. Where it knows the characters of each token ("fast" tokenizers), the result is a beginning
        and an end of `text`, character for character; otherwise the kept tokens are decoded, as LongBench does.
    max_tokens : int
        Limit of the result when it is tokenised again. Some tokens are split differently then, so it may hold a few
        less than that.
    following : int
        Tokens that come after the text and count to the last half. Negative for tokens that come before it.

    Returns
    -------
    str
        At most `max_tokens` tokens. A character of several tokens is kept whole or left out.

    Raises
    ------
    ValueError
        If `max_tokens` is negative.

    Notes
    -----
    LongBench's `pred.py` cuts the whole prompt, so that half of the tokens left stand before the cut. Here only the
    context is cut, and `following` moves the cut to where it would be in the whole prompt.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be at least 0, got {max_tokens}")
    if count_tokens(text, tokenizer) <= max_tokens:
        return text
    take = _by_offsets(text, tokenizer) if tokenizer.is_fast else _by_decoding(text, tokenizer)
    kept = max_tokens
    while kept > 0:
        first = min(max((kept + following) // 2, 0), kept)
        shortened = take(first, kept - first)
        excess = count_tokens(shortened, tokenizer) - max_tokens
        if excess <= 0:
            return shortened
        kept -= excess
    return ""


def _by_offsets(text: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[int, int], str]:
    """Return a function that joins the characters of the first and the last tokens."""
    options = {"add_special_tokens": False, "verbose": False, "return_offsets_mapping": True}
    spans = tokenizer(text, **options)["offset_mapping"]

    def take(first: int, last: int) -> str:
        end = spans[first - 1][1] if first else 0
        # The tokens of one character all span it; one of them on each side must not double it.
        start = max(spans[-last][0], end) if last else len(text)
        return text[:end] + text[start:]

    return take


def _by_decoding(text: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[int, int], str]:
    """Return a function that joins the decoded first and last tokens, without halves of characters at the cut."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=True))

    def take(first: int, last: int) -> str:
        return decode(ids[:first]).rstrip("\ufffd") + decode(ids[len(ids) - last :]).lstrip("\ufffd")

    return take
