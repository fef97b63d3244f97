"""The calls that programs are made of: each is a function that writes lines of Python, with the choices it has.

What is run is what is printed: a line means the same for DynamicCache and for PiKVCache. The first choice of each
argument is the simplest, which a failing program is reduced to.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

SEEDS = (1, 2, 3, 4)
CONTEXTS = {
    "no_grad": "",
    "inference_mode": "with torch.inference_mode():",
    "enable_grad": "with torch.enable_grad():",
    "autocast": 'with torch.autocast("cpu", dtype=torch.bfloat16):',
}
#: A random model ends a row with one of these at every fourth token.
MANY_ENDS = "list(range(2, 198, 4))"


@dataclasses.dataclass(frozen=True)
class View:
    """What an operation may know when it writes its lines.

    Attributes
    ----------
    batch : int
        Rows.
    length : int
        Columns of `ids` and `mask`: all that the cache has seen, and what `generate` returned last.
    past : int
        Columns that the cache has seen.
    hidden : bool
        Whether the mask hides anything.
    kept : bool
        Whether a twin has been put aside.
    eager_only, sliding, attached, routed : bool
        Of the model and its cache: whether it has no sdpa attention, has layers that drop what has left their window,
        was made for an attached model, has expert routers.
    eager : bool
        Whether DynamicCache's attention is eager now, which adds boolean masks as numbers.
    devices : list of str or None
        Where the shards are.
    """

    batch: int
    length: int
    past: int
    hidden: bool
    kept: bool
    eager_only: bool
    sliding: bool
    attached: bool
    routed: bool
    eager: bool
    devices: list[str] | None


@dataclasses.dataclass(frozen=True)
class Operation:
    """A kind of call: what writes its lines, and the choices for each argument of that.

    Attributes
    ----------
    write : callable
        Returns lines, none where the call makes no sense.
    choices : dict of str to tuple
        The choices for each argument; a choice that is named twice is drawn twice as often.
    weight : int
        How often it is drawn, relative to the others.
    """

    write: Callable[..., list[str]]
    choices: dict[str, tuple[Any, ...]]
    weight: int


ALPHABET: dict[str, Operation] = {}


def operation(weight: int, **choices: tuple[Any, ...]) -> Callable[[Callable[..., list[str]]], Any]:
    """Add a function to the alphabet under its own name."""

    def add(write: Callable[..., list[str]]) -> Callable[..., list[str]]:
        ALPHABET[write.__name__] = Operation(write, choices, weight)
        return write

    return add


def _within(context: str, line: str) -> list[str]:
    return [CONTEXTS[context], f"    {line}"] if CONTEXTS[context] else [line]


def _grow(view: View, new: int, padding: str, seed: int) -> list[str]:
    """Append random tokens to `ids`, and whether they are shown to `mask`."""
    size = f"{view.batch}, {new}"
    if padding == "repeating":
        return [f"ids = torch.cat([ids, repeating({new}, {seed})], 1)", f"mask = torch.cat([mask, ones({size})], 1)"]
    if padding not in ("left", "right", "holes"):
        return [f"ids = torch.cat([ids, tokens({size}, {seed})], 1)", f"mask = torch.cat([mask, ones({size})], 1)"]
    return [
        f'shown = padded({size}, "{padding}", {seed})',
        f"ids, mask = torch.cat([ids, tokens({size}, {seed}) * shown], 1), torch.cat([mask, shown], 1)",
    ]


@operation(
    10,
    new=(1, 1, 2, 5, 12, 23),
    mask=("none", "none", "ones", "left", "left", "right", "holes", "hide", "show", "4d bool", "4d float", "4d holes"),
    source=("ids", "ids", "embeds"),
    positions=("none", "none", "mask", "offset", "jump"),
    cache_position=(False, False, False, True),
    context=("no_grad", "no_grad", "no_grad", "inference_mode", "enable_grad", "autocast"),
    seed=SEEDS,
)
def forward(view: View, drawn: Any) -> list[str]:
    """Call the model with new tokens."""
    lines = _grow(view, drawn.new, drawn.mask, drawn.seed)
    if drawn.mask == "hide":
        lines += [f"mask = hiding(mask, {drawn.seed})", "ids = ids * mask"]
    elif drawn.mask == "show":
        lines.append("mask = torch.ones_like(mask)")
    unseen, total = f"ids[:, {view.past}:]", view.length + drawn.new - view.past
    arguments = [unseen if drawn.source == "ids" else f"inputs_embeds=model.get_input_embeddings()({unseen})"]
    arguments += _mask_argument(view, drawn, total) + _position_arguments(view, drawn, total)
    call = f"model({', '.join(arguments)}, past_key_values=cache)"
    return lines + _within(drawn.context, f"show({call}.logits, mask[:, {view.past}:])")


def _mask_argument(view: View, drawn: Any, total: int) -> list[str]:
    if drawn.mask.startswith("4d"):
        kind = "torch.bool" if drawn.mask == "4d bool" and not view.eager else "model.dtype"
        holes = f", {drawn.seed}" if drawn.mask == "4d holes" else ""
        return [f"attention_mask=mask_4d(mask, {total}, {kind}{holes})"]
    return ["attention_mask=mask"] if drawn.mask != "none" or view.hidden else []


def _position_arguments(view: View, drawn: Any, total: int) -> list[str]:
    """Number the tokens as the mask counts them, from 5 on, or with a jump in the middle."""
    numbers = f"torch.arange({view.past}, {view.past + total})"
    arguments = {
        "none": [],
        "mask": [f"position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, {view.past}:]"],
        "offset": [f"position_ids={numbers}[None] + 5"],
        "jump": [f"position_ids={numbers}[None] + 7 * (torch.arange({total}) >= {total // 2}).long()[None]"],
    }[drawn.positions]
    return [*arguments, f"cache_position={numbers}"] if drawn.cache_position else arguments


#: How `generate` decodes: its options, and the rows it makes of one.
DECODING: dict[str, tuple[str, int]] = {
    "greedy": ("do_sample=False", 1),
    "sample": ("do_sample=True, top_k=20", 1),
    "return 2": ("do_sample=True, num_return_sequences=2", 2),
    "beams": ("num_beams=3, do_sample=False", 3),
    "beam sample": ("num_beams=2, do_sample=True, num_return_sequences=2", 2),
    "lookup": ("do_sample=False, prompt_lookup_num_tokens=3", 1),
    "assistant": ("do_sample=False, assistant_model=assistant", 1),
}


@operation(
    7,
    turn=(1, 4, 9, 17),
    how=("greedy", "greedy", "greedy", "sample", "return 2", "beams", "beam sample", "lookup", "assistant"),
    steps=(2, 4, 8),
    padding=("none", "none", "left", "left", "right", "holes"),
    mask=("given", "given", "omitted"),
    ends=("never", "never", "never", "often", "often, then hidden"),
    chunk=(None, None, None, None, 5),
    context=("no_grad", "no_grad", "no_grad", "inference_mode", "autocast"),
    seed=SEEDS,
)
def generate(view: View, drawn: Any) -> list[str]:
    """Another turn: new tokens, and the model's answer."""
    rows, drafts = DECODING[drawn.how][1], drawn.how in ("lookup", "assistant")
    if view.batch * rows > 6 or (drafts and (view.batch > 1 or view.sliding)):
        return []
    lines = _grow(view, drawn.turn, "repeating" if drawn.how == "lookup" else drawn.padding, drawn.seed)
    if drawn.mask == "omitted":
        # As `generate` infers it.
        lines.append("mask = (ids != PAD).long()")
    if rows > 1 and view.past:
        lines.append(f"cache.batch_repeat_interleave({rows})")
    if "do_sample=True" in DECODING[drawn.how][0]:
        lines.append(f"torch.manual_seed({drawn.seed})")
    call = f"model.generate({', '.join(_generate_arguments(view, drawn))})"
    lines += [*_within(drawn.context, f"out = {call}"), "show(out)"]
    return lines + _answered(view, drawn, rows)


def _generate_arguments(view: View, drawn: Any) -> list[str]:
    drafts = drawn.how in ("lookup", "assistant")
    # transformers' prompt lookup fails without an end token.
    ends = MANY_ENDS if drawn.ends != "never" else "198" if drafts else "None"
    arguments = ["ids", "attention_mask=mask"] if drawn.mask == "given" else ["ids"]
    arguments += ["past_key_values=cache", f"max_new_tokens={drawn.steps}", DECODING[drawn.how][0]]
    arguments += [f"eos_token_id={ends}", "pad_token_id=PAD", "return_dict_in_generate=True"]
    if not drafts:
        arguments.append("output_logits=True")
    # transformers reads all of a conversation in chunks, also what the cache has seen.
    return [*arguments, f"prefill_chunk_size={drawn.chunk}"] if drawn.chunk and not view.past else arguments


def _answered(view: View, drawn: Any, rows: int) -> list[str]:
    """Note what `generate` returned, or where beams have no order that is known outside, what the cache may hold."""
    before = view.length + drawn.turn
    mask = "mask" if rows == 1 else f"mask.repeat_interleave({rows}, 0)"
    if "beam" in drawn.how:
        columns = f"{view.batch * rows}, cache.get_seq_length()"
        return [
            f"mask = torch.cat([{mask}, ones({columns} - {before})], 1)",
            f"ids = tokens({columns}, {drawn.seed}) * mask",
        ]
    answer = f"ids[:, {before}:]"
    shown = f"({answer} != PAD).long()" if drawn.ends == "often, then hidden" else f"torch.ones_like({answer})"
    return ["ids = out.sequences", f"mask = torch.cat([{mask}, {shown}], 1)"]


@operation(4, by=(1, 3, 8, 20, "all"), sign=("negative", "positive"))
def crop(view: View, drawn: Any) -> list[str]:
    """Take the last tokens back."""
    if not view.past:
        return []
    amount = view.past if drawn.by == "all" else min(drawn.by, view.past)
    left = view.past - amount
    length = -amount if drawn.sign == "negative" else left
    return [f"cache.crop({length})", f"ids, mask = ids[:, :{left}], mask[:, :{left}]"]


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
    if view.sliding:
        return []  # Left out for a while: sliding layers keep their batch.
    return [
        "if pikv:",
        "    cache.reset()",
        "else:",
        "    cache = fresh()",
        f"ids, mask = tokens({drawn.batch}, 0, 0), ones({drawn.batch}, 0)",
    ]


@operation(3, how=("fork", "copy.deepcopy"), then=("go on", "keep", "swap", "ask"), seed=SEEDS)
def twin(view: View, drawn: Any) -> list[str]:
    """Copy the cache, and go on with the copy, with the original, or with one that was put aside."""
    how, then = drawn.how, drawn.then
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
    return ["if pikv:", f"    cache = saved_and_loaded(cache, model, {view.devices})"] if view.attached else []


@operation(2, to=("detach", "attach", "eager", "sdpa", "pikv"))
def implementation(view: View, drawn: Any) -> list[str]:
    """Change how the model attends."""
    to, placement = drawn.to, "" if view.routed else ', "hash"'
    if to in ("detach", "attach"):
        return ["if pikv:", f"    {to}(model{placement if to == 'attach' else ''})"] if view.attached else []
    if to == "pikv":
        return ["if pikv:", '    model.set_attn_implementation("pikv")'] if view.attached else []
    return [] if view.eager_only else [f'model.set_attn_implementation("{to}")']


@operation(1, to=("float16", "bfloat16", "float32"), empties=(True, True, True, False), batch=(1, 2, 3))
def dtype(view: View, drawn: Any) -> list[str]:
    """Change the model's dtype; what is stored in the other one can be used no longer."""
    return [f"model.to(torch.{drawn.to})", *(reset(view, drawn) if drawn.empties else [])]


@operation(2, kind=("forward", "generate"), count=(2, 3))
def threads(view: View, drawn: Any) -> list[str]:
    """Ask several questions about one context at the same time, each in a thread with a copy of its own."""
    size = f"{view.batch}, 2, number"
    asked, seen = f"torch.cat([ids, tokens({size})], 1)", f"torch.cat([mask, ones({view.batch}, 2)], 1)"
    if drawn.kind == "forward":
        call = f"model({asked}[:, {view.past}:], attention_mask={seen}, past_key_values=copied).logits[:, -1]"
    else:
        options = "max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=PAD"
        call = f"model.generate({asked}, attention_mask={seen}, past_key_values=copied, {options})"
    return [
        f"answers = in_threads(lambda copied, number: {call}, [fork(cache) for _ in range({drawn.count})])",
        *(f"show(answers[{number}])" for number in range(drawn.count)),
    ]
