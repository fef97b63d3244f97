"""Make a prompt fit a model's context, frame and question included."""

import dataclasses

from transformers import PreTrainedTokenizerBase

from pikv_hf.eval.tasks.frame import frame
from pikv_hf.eval.tasks.longbench.truncate import count_tokens, truncate_middle
from pikv_hf.eval.tasks.sample import EvalSample


def fit(sample: EvalSample, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> EvalSample:
    """Cut a sample's context in its middle until the whole prompt has at most `max_tokens` tokens.

    Context and question are counted apart, each with its frame, since that is how the pipeline reads them.

    Raises
    ------
    ValueError
        If frame, question and answer prefix leave no token for the context.
    """
    before, between = frame(tokenizer)
    ahead = count_tokens(before, tokenizer)
    after = count_tokens(sample.question + between + sample.answer_prefix, tokenizer)
    room = max_tokens - ahead - after
    if room < 1:
        raise ValueError(
            f"{sample.id}: max_context of {max_tokens} tokens leaves none for the context, the rest has {ahead + after}"
        )
    context = truncate_middle(sample.context, tokenizer, room, following=after - ahead)
    # At their border, frame and context may become more tokens together than they have apart.
    while (excess := count_tokens(before + context, tokenizer) + after - max_tokens) > 0:
        room = max(room - excess, 0)
        context = truncate_middle(sample.context, tokenizer, room, following=after - ahead)
    return dataclasses.replace(sample, context=context)
