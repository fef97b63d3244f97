"""Find what stands around a context and its question in the prompt that kvpress's pipeline builds."""

from transformers import PreTrainedTokenizerBase

from pikv_hf.eval.errors import InputError, user_input

# Occurs in no text.
_MARK = "\0context\0"


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Return what is put before the context, and between the question and the answer prefix.

    That is the beginning-of-text token, where there is one, and a newline; or with a chat template what it puts before
    and after a user's message.

    Raises
    ------
    InputError
        If the chat template cannot be applied, or leaves out the user's message.
    """
    if tokenizer.chat_template is None:
        return tokenizer.bos_token or "", "\n"
    message = [{"role": "user", "content": _MARK}]
    with user_input("cannot apply the tokenizer's chat template"):
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    before, mark, between = str(text).partition(_MARK)
    if not mark:
        raise InputError("the tokenizer's chat template leaves out the user's message")
    return before, between
