"""What happens to a cache between calls of the model, and to the model."""

import random
from typing import Any

from program_operation import SEEDS, View, operation


@operation(4, by=(1, 3, 8, 20, "all", 0, -4), sign=("negative", "positive"))
def crop(view: View, drawn: Any) -> list[str]:
    """Take the last tokens back, or none: a length of all there is, or more, changes nothing."""
    if not view.past:
        return []
    if drawn.by in (0, -4):
        return [f"crop_to(cache, {view.past - drawn.by})"]
    amount = view.past if drawn.by == "all" else min(drawn.by, view.past)
    left = view.past - amount
    cut = f"cache.crop(-{amount})" if drawn.sign == "negative" else f"crop_to(cache, {left})"
    return [cut, f"ids, mask = ids[:, :{left}], mask[:, :{left}]"]


def _rows(view: View, seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(view.batch) for _ in range(count)]


@operation(2, seed=SEEDS)
def reorder(view: View, drawn: Any) -> list[str]:
    """Reorder the rows, as beam search does."""
    return [
        f"index = torch.tensor({_rows(view, drawn.seed, view.batch)})",
        "cache.reorder_cache(index)",
        "ids, mask = ids[index], mask[index]",
    ]


@operation(1, times=(2, 3))
def repeat(view: View, drawn: Any) -> list[str]:
    """Repeat every row."""
    times = drawn.times
    if view.batch * times > 6:
        return []
    return [
        f"cache.batch_repeat_interleave({times})",
        f"ids, mask = ids.repeat_interleave({times}, 0), mask.repeat_interleave({times}, 0)",
    ]


@operation(2, count=(1, 2, 3), kind=("integers", "booleans"), seed=SEEDS)
def select(view: View, drawn: Any) -> list[str]:
    """Keep some of the rows."""
    chosen = _rows(view, drawn.seed, min(drawn.count, view.batch))
    index = chosen if drawn.kind == "integers" else [row in chosen for row in range(view.batch)]
    return [
        f"index = torch.tensor({index})",
        "cache.batch_select_indices(index)",
        "ids, mask = ids[index], mask[index]",
    ]


@operation(1, batch=(1, 2, 3))
def reset(view: View, drawn: Any) -> list[str]:
    """Start over, with another batch; transformers' own `reset` keeps the length, a new cache is what is meant."""
    return [
        "if pikv:",
        "    cache.reset()",
        "else:",
        "    cache = fresh()",
        f"ids, mask = tokens({drawn.batch}, 0, 0), ones({drawn.batch}, 0)",
    ]


@operation(3, how=("fork", "copy.deepcopy"), then=("go on", "keep", "swap", "another", "ask"), seed=SEEDS)
def twin(view: View, drawn: Any) -> list[str]:
    """Copy the cache, or make another, and go on with the copy, the original, or one that was put aside."""
    then = drawn.then
    # DynamicCache's own deepcopy fails once it holds K/V with gradients.
    how = "fork" if drawn.how == "fork" else "(copy.deepcopy if pikv else fork)"
    if then == "another":
        return [f"kept = fresh(), tokens({view.batch}, 0, 0), ones({view.batch}, 0)"]
    if then == "swap" and view.kept:
        return ["(cache, ids, mask), kept = kept, (cache, ids, mask)"]
    if then == "go on" or not view.past:
        return [f"cache = {how}(cache)"]
    if then in ("keep", "swap"):
        return [f"kept = {how}(cache), ids, mask"]
    return [
        f"asked = {how}(cache)",
        f"unseen = torch.cat([ids[:, {view.past}:], tokens({view.batch}, 3, {drawn.seed})], 1)",
        f"seen = torch.cat([mask, ones({view.batch}, 3)], 1)",
        f"show(model(unseen, attention_mask=seen, past_key_values=asked).logits, seen[:, {view.past}:])",
    ]


@operation(2)
def save_and_load(view: View, drawn: Any) -> list[str]:
    """Write the cache to a file and go on with what is read from it."""
    if not view.attached:
        return []
    devices = view.cache_options["devices"]
    return ["if pikv:", f"    cache = saved_and_loaded(cache, model, {devices})"]


@operation(2, to=("detach", "attach", "eager", "sdpa", "pikv"))
def implementation(view: View, drawn: Any) -> list[str]:
    """Change how the model attends."""
    to, placement = drawn.to, "" if view.routed else ', "hash"'
    if to in ("detach", "attach"):
        return ["if pikv:", f"    {to}(model{placement if to == 'attach' else ''})"] if view.attached else []
    if to == "pikv":
        return ["if pikv:", '    model.set_attn_implementation("pikv")'] if view.attached else []
    return [] if view.one_attention else [f'model.set_attn_implementation("{to}")']


@operation(1, to=("float16", "bfloat16", "float32"), empties=(True, True, True, False), batch=(1, 2, 3))
def dtype(view: View, drawn: Any) -> list[str]:
    """Change the model's dtype; what is stored in the other one can be used no longer."""
    return [f"model.to(torch.{drawn.to})", *(reset(view, drawn) if drawn.empties else [])]


@operation(1, batch=(1, 2), new=(3, 12), seed=SEEDS)
def convert(view: View, drawn: Any) -> list[str]:
    """Begin with a DynamicCache and go on with what is made of it."""
    if not view.attached:
        return []
    config = "" if view.cache_options["sliding_layers"] == "paged" else "config=model.config"
    options = "".join(f", {name}={value!r}" for name, value in view.cache_options.items())
    size = f"{drawn.batch}, {drawn.new}"
    return [
        f"cache, ids, mask = DynamicCache({config}), tokens({size}, {drawn.seed}), ones({size})",
        "show(model(ids, past_key_values=cache).logits)",
        "if pikv:",
        f"    cache = PiKVCache.from_cache(model, cache{options})",
    ]
