"""Calls of the model: forward passes and generation."""

from typing import Any

from program_operation import SEEDS, View, operation

CONTEXTS = {
    "ambient": "",
    "inference_mode": "with torch.inference_mode():",
    "enable_grad": "with torch.enable_grad():",
    "autocast": 'with torch.autocast("cpu", dtype=torch.bfloat16):',
}
#: A random model ends a row with one of these at every fourth token.
MANY_ENDS = "list(range(2, 198, 4))"


def _within(view: View, context: str, line: str) -> list[str]:
    """Indent a line below its context, by default that of the program."""
    context = "autocast" if view.autocast and context == "ambient" else context
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
    mask=(
        *("none", "none", "ones", "bool", "left", "left", "right", "holes", "hide", "show", "short"),
        *("4d bool", "4d float", "4d holes"),
    ),
    source=("ids", "ids", "embeds"),
    positions=("none", "none", "mask", "offset", "jump"),
    cache_position=(False, False, False, True),
    last=(False, False, False, True),
    context=(*("ambient",) * 12, *("inference_mode",) * 4, *("enable_grad",) * 3, "autocast"),
    seed=SEEDS,
)
def forward(view: View, drawn: Any) -> list[str]:
    """Call the model with new tokens."""
    lines = _grow(view, drawn.new, drawn.mask, drawn.seed)
    if drawn.mask == "hide":
        lines += [f"mask = hiding(mask, {drawn.seed})", "ids = ids * mask"]
    elif drawn.mask == "show":
        lines.append("mask = torch.ones_like(mask)")
    elif drawn.mask == "short":
        lines.append(f"mask = torch.cat([mask[:, {view.past}:], torch.zeros_like(mask[:, :{view.past}])], 1)")
        lines.append("ids = ids * mask")
    unseen, total = f"ids[:, {view.past}:]", view.length + drawn.new - view.past
    arguments = [unseen if drawn.source == "ids" else f"inputs_embeds=model.get_input_embeddings()({unseen})"]
    arguments += _mask_argument(view, drawn, total) + _position_arguments(view, drawn, total)
    if drawn.last:
        arguments.append("logits_to_keep=1")
    call = f"model({', '.join(arguments)}, past_key_values=cache)"
    return lines + _within(view, drawn.context, f"show({call}.logits, mask[:, {-1 if drawn.last else view.past}:])")


def _mask_argument(view: View, drawn: Any, total: int) -> list[str]:
    if drawn.mask.startswith("4d"):
        kind = "torch.bool" if drawn.mask == "4d bool" and not view.eager else "model.dtype"
        holes = f", {drawn.seed}" if drawn.mask == "4d holes" else ""
        return [f"attention_mask=mask_4d(mask, {total}, {kind}{holes})"]
    if drawn.mask == "bool":
        return ["attention_mask=mask.bool()"]
    if drawn.mask == "short":
        # transformers takes the columns that are missing for hidden ones.
        return [f"attention_mask=mask[:, :{total}]"]
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
    "guided": ("do_sample=False, guidance_scale=1.5", 1),
    "lookup": ("do_sample=False, prompt_lookup_num_tokens=3", 1),
    "assistant": ("do_sample=False, assistant_model=assistant", 1),
}


@operation(
    7,
    turn=(1, 4, 9, 17),
    how=("greedy", "greedy", "greedy", "sample", "return 2", "beams", "beam sample", "guided", "lookup", "assistant"),
    steps=(2, 1, 4, 8),
    padding=("none", "none", "left", "left", "right", "holes"),
    mask=("given", "given", "omitted"),
    ends=("never", "never", "never", "often", "often, then hidden"),
    chunk=(None, None, None, None, 5),
    context=(*("ambient",) * 4, "inference_mode"),
    seed=SEEDS,
)
def generate(view: View, drawn: Any) -> list[str]:
    """Another turn: new tokens, and the model's answer."""
    rows, drafts = DECODING[drawn.how][1], drawn.how in ("lookup", "assistant")
    if view.batch * rows > 6 or (drafts and (view.batch > 1 or view.sliding)):
        return []
    # A last token that is hidden may see nothing in its window, which eager and sdpa attention take differently.
    padding = "left" if view.windowed and drawn.padding in ("right", "holes") else drawn.padding
    lines = _grow(view, drawn.turn, "repeating" if drawn.how == "lookup" else padding, drawn.seed)
    if drawn.mask == "omitted":
        # As `generate` infers it.
        lines.append("mask = (ids != PAD).long()")
    if rows > 1 and view.past:
        # A copy: where the call is refused, the cache is as it was.
        lines += ["cache = fork(cache)", f"cache.batch_repeat_interleave({rows})"]
    if "do_sample=True" in DECODING[drawn.how][0]:
        lines.append(f"torch.manual_seed({drawn.seed})")
    call = f"model.generate({', '.join(_generate_arguments(view, drawn))})"
    lines += [*_within(view, drawn.context, f"out = {call}"), "show(out)"]
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
