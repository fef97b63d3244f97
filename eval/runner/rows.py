"""Make one row per sample: the answer, its scores, and what it cost."""

import json
from collections.abc import Sequence
from typing import Any

from pikv_hf.eval.runner.folder import Row
from pikv_hf.eval.runner.memory_meter import DynamicFootprint
from pikv_hf.eval.runner.meter import Cost
from pikv_hf.eval.runner.protocol import Answer
from pikv_hf.eval.tasks.sample import EvalSample, Scores


def answer_row(
    sample: EvalSample, answer: Answer, scores: Scores, shares: Row, ratio: float, columns: Sequence[str] = ()
) -> Row:
    """Return the row of a question: kvpress's columns and those of the suite, then scores, then costs."""
    metric = next(iter(scores))
    return {
        "id": sample.id,
        "task": sample.task,
        "length": sample.length,
        **{name: sample.extra[name] for name in columns},
        "question": sample.question,
        "answer_prefix": sample.answer_prefix,
        "answer": json.dumps(list(sample.answers), ensure_ascii=False),
        "predicted_answer": answer.text,
        "max_new_tokens": sample.max_new_tokens,
        "compression_ratio": ratio,
        "metric": metric,
        "score": scores[metric],
        **scores,
        "context_tokens": answer.context_tokens,
        "question_tokens": answer.question_tokens,
        "new_tokens": answer.new_tokens,
        **shares,
        # The first token comes with the question; only the others are steps of their own.
        **times(answer.cost, answer.rows, answer.context_tokens, answer.new_tokens - 1),
    }


def kv_shares(cost: Cost, rows: int, footprint: DynamicFootprint, prefill: list[int], end: list[int]) -> Row:
    """Return a batch's bytes per row, and as shares of what `DynamicCache` would hold for the same tokens.

    Parameters
    ----------
    cost : Cost
        Of the batch.
    rows : int
        Sequences in it.
    footprint : DynamicFootprint
        Of the model.
    prefill, end : list of int
        Tokens of each sequence after the prefill and at the end.
    """
    row: dict[str, Any] = {"kv_bytes_prefill": cost.kv_bytes_prefill // rows, "kv_bytes_end": cost.kv_bytes_end // rows}
    for stage, stored, tokens in (
        ("prefill", cost.kv_bytes_prefill, prefill),
        ("end", cost.kv_bytes_end, end),
    ):
        row[f"kv_share_{stage}"] = stored / sum(footprint.bf16_bytes(count) for count in tokens)
        row[f"kv_share_{stage}_dtype"] = stored / sum(footprint.own_bytes(count) for count in tokens)
    return row


def times(cost: Cost, rows: int, context_tokens: int, steps: int) -> Row:
    """Return a row's part of its batch's times, speeds, and the peaks of the batch.

    Parameters
    ----------
    cost : Cost
        Of the batch.
    rows : int
        Sequences in it.
    context_tokens : int
        Read in `cost.prefill_seconds`.
    steps : int
        Tokens that `cost.decode_seconds` was spent on.
    """
    prefill, decode = cost.prefill_seconds / rows, cost.decode_seconds / rows
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "decode_steps": steps,
        "prefill_tokens_per_s": context_tokens / prefill,
        "decode_tokens_per_s": steps / decode if steps else None,
        "peak_memory_bytes": cost.peak_memory_bytes,
        "cuda_peak_bytes": cost.cuda_peak_bytes,
    }
