"""Calls beside the conversation: threads, calls within calls, interrupted ones, other caches, gradients, reports."""

from typing import Any

from program_operation import SEEDS, View, operation
from program_words import KEEPS

_PLACES = ("attention 0", "layer 0", "attention 1", "layer 1")


def _next(view: View, new: int, seed: int) -> tuple[str, str]:
    """Return what the cache has not seen with new tokens, and the mask of everything."""
    size = f"{view.batch}, {new}"
    unseen = f"torch.cat([ids[:, {view.past}:], tokens({size}, {seed})], 1)"
    return unseen, f"torch.cat([mask, ones({size})], 1)"


def _call(view: View, new: int, seed: int, cache: str) -> str:
    unseen, mask = _next(view, new, seed)
    return f"model({unseen}, attention_mask={mask}, past_key_values={cache})"


@operation(2, kind=("forward", "generate"), caches=("fork(cache)", "fork(cache)", "fresh()"), count=(2, 3))
def threads(view: View, drawn: Any) -> list[str]:
    """Ask several questions at the same time, each in a thread with a cache of its own or a copy of this one."""
    if drawn.caches == "fresh()":
        call, extra = "model(tokens(2, 9 + number, number), past_key_values=copied)", "tokens(2, 9 + number, number), "
    else:
        size = f"{view.batch}, 2, number"
        unseen, seen = f"torch.cat([ids, tokens({size})], 1)", f"torch.cat([mask, ones({view.batch}, 2)], 1)"
        call = f"model({unseen}[:, {view.past}:], attention_mask={seen}, past_key_values=copied)"
        extra = f"{unseen}, attention_mask={seen}, "
    work = f"{call}.logits[:, -1]"
    if drawn.kind == "generate":
        options = "max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=PAD"
        work = f"model.generate({extra}past_key_values=copied, {options})"
    return [
        f"answers = in_threads(lambda copied, number: {work}, [{drawn.caches} for _ in range({drawn.count})])",
        *(f"show(answers[{number}])" for number in range(drawn.count)),
    ]


@operation(1, place=_PLACES, inner=("fresh()", "fork(cache)", "None"), new=(1, 4), seed=SEEDS)
def nested(view: View, drawn: Any) -> list[str]:
    """Call the model from within a call of the model."""
    inner = f"lambda: show(model(tokens({view.batch}, 3, 1), past_key_values=other).logits[:, -1])"
    unseen, mask = _next(view, drawn.new, drawn.seed)
    if drawn.inner == "fork(cache)":
        inner = f"lambda: show({_call(view, 2, 1, 'other')}.logits[:, -1])"
    outer = f"lambda: show({_call(view, drawn.new, drawn.seed, 'cache')}.logits[:, -1])"
    return [
        f"other = {drawn.inner}",
        f'during(model, "{drawn.place}", {inner}, {outer})',
        f"ids, mask = torch.cat([ids[:, :{view.past}], {unseen}], 1), {mask}",
    ]


@operation(1, place=_PLACES, new=(1, 4, 9), seed=SEEDS)
def interrupted(view: View, drawn: Any) -> list[str]:
    """Stop a call half-way, and take its tokens back; a crop that only removes takes them from layers without, too."""
    if not view.past or not KEEPS:
        return []
    return [
        f'during(model, "{drawn.place}", stop, lambda: {_call(view, drawn.new, drawn.seed, "cache")})',
        f"crop_to(cache, {view.past})",
    ]


@operation(1, cache=("DynamicCache(config=model.config)", "fresh()", "None"), new=(1, 4, 15), seed=SEEDS)
def another(view: View, drawn: Any) -> list[str]:
    """Use the model with another cache, or none."""
    return [f"show(model(tokens(2, {drawn.new}, {drawn.seed}), past_key_values={drawn.cache}).logits)"]


@operation(1, new=(1, 4), frozen=(True, False), seed=SEEDS)
def gradient(view: View, drawn: Any) -> list[str]:
    """Differentiate by the embeddings of the newest tokens; what the cache holds already is a constant."""
    if view.hidden:
        return []
    unseen, mask = _next(view, drawn.new, drawn.seed)
    return [
        f"unseen = {unseen}",
        "embeds = model.get_input_embeddings()(unseen).detach().requires_grad_()",
        "with torch.enable_grad():",
        "    logits = model(inputs_embeds=embeds, past_key_values=cache).logits",
        "    show(torch.autograd.grad(logits.logsumexp(-1).sum(), embeds)[0])",
        "show(logits.detach())",
        f"ids, mask = torch.cat([ids[:, :{view.past}], unseen], 1), {mask}",
    ]


@operation(1, at=("repr(cache)", "cache.memory_report()", "cache.stats()", "list(cache)"))
def look(view: View, drawn: Any) -> list[str]:
    """Look at the cache, which changes nothing."""
    return ["if pikv:", f"    str({drawn.at})"]
