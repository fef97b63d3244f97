"""Ask several questions about each context, one after the other or each by itself, with a store of contexts or without.

In the multi-turn mode of SCBench (arXiv 2412.10319) a question comes after those before it and their right answers, in
its multi-request mode right after the context.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from pikv_hf import ContextStore
from pikv_hf.common.transformers_release import cache_argument
from pikv_hf.eval.tasks.scbench.records import Record
from pikv_hf.eval.tasks.scbench.sets import Task, question, score

Row = dict[str, Any]


def ask_all(
    model: Any,
    tokenizer: Any,
    task: Task,
    records: Sequence[Record],
    store: ContextStore | None,
    same_context: bool,
    max_new_tokens: int | None = None,
) -> Iterator[Row]:
    """Yield a row for each question, in order: its score, and the tokens that were read and reused for it.

    Parameters
    ----------
    model, tokenizer
        The model that answers, greedily.
    task : Task
        How questions are asked.
    records : sequence of Record
        Contexts and their questions.
    store : ContextStore, optional
        Of the model; without one each prompt is read by a `DynamicCache` of its own.
    same_context : bool
        Whether each question comes right after the context.
    max_new_tokens : int, optional
        Instead of the task's own limit.
    """
    for record in records:
        said: list[str] = []
        for number, turn in enumerate(record.turns):
            asked = question(task, turn)
            said.append(task.before + record.context + asked if same_context or not said else asked)
            if same_context:
                said = said[-1:]
            ids = message_ids(tokenizer, _conversation(said), enable_thinking=False).to(model.device)
            began = time.perf_counter()
            answer, reused = _answer(model, tokenizer, store, ids, max_new_tokens or task.max_new_tokens)
            yield {
                "id": record.id,
                "turn": number,
                "score": score(task, turn, answer),
                "tokens": ids.shape[1],
                "reused": reused,
                "read": ids.shape[1] - reused,
                "seconds": round(time.perf_counter() - began, 4),
                "answer": answer,
            }
            said.append(turn.answers[0])


def message_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], **template: Any) -> torch.Tensor:
    """Return the prompt of a conversation, the last message to be answered, `(1, n)`.

    Without a chat template messages are lines.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        text, specials = "\n".join(each["content"] for each in messages), True
    else:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
        specials = False
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=specials)["input_ids"]
    return ids


def _conversation(said: Sequence[str]) -> list[dict[str, str]]:
    """Return questions and the answers between them as messages."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]


def _answer(model: Any, tokenizer: Any, store: ContextStore | None, ids: torch.Tensor, most: int) -> tuple[str, int]:
    """Return an answer, and how many tokens of the prompt were reused."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    given = {"attention_mask": torch.ones_like(ids), "pad_token_id": pad, "max_new_tokens": most, "do_sample": False}
    if store is None:
        output = model.generate(ids, **given, **cache_argument(DynamicCache(config=model.config)))
        reused = 0
    else:
        before = store.stats().tokens_reused
        output = store.generate(ids, **given)
        reused = store.stats().tokens_reused - before
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip(), reused


def summary_of(rows: Sequence[Row]) -> Row:
    """Return means over questions, and sums of tokens and seconds."""
    totals = {name: sum(row[name] for row in rows) for name in ("tokens", "reused", "read", "seconds")}
    return {"questions": len(rows), "score": 100 * statistics.fmean(row["score"] for row in rows), **totals}
