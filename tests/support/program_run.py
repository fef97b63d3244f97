"""Running a program on DynamicCache and on PiKVCache, and comparing them after every call."""

import dataclasses
import functools
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from families import FAMILIES
from program_alphabet import ALPHABET
from program_calls import CONTEXTS
from program_compare import Difference, difference, farthest
from program_draw import Call, Program
from program_models import ATTENTION, assistant_of, model_of, new_cache
from program_operation import View
from program_words import KEEPS, WORDS, ones, tokens

from pikv_hf.layer.layer import PiKVLayer

#: What may be refused where DynamicCache goes on: kind, what the message says, and what the program must have done.
REFUSALS: dict[str, tuple[str, str]] = {
    "padding shown later": ("was padding when it came and was never stored", ""),
    "padded rows, model detached": ("rows of this cache are padded, and padding is not stored", "detach"),
    "padded rows, iterated": ("padding was left out, dense K/V would have zeros in their place", r"list\(cache\)"),
    "fast memory too small": (r"tier 'cpu' may hold \d+ bytes", ""),
    "another dtype than what is stored": (
        r"got torch\.\w+ on cpu, but the cache holds torch\.\w+",
        r"autocast|model\.to\(",
    ),
    "latents of other weights": (
        "the weights of kv_b_proj have changed since this cache got its latents",
        r"model\.to\(",
    ),
}

#: At the end of every program: that the cache goes on.
LAST = Call("forward", {name: choices[0] for name, choices in ALPHABET["forward"].choices.items()})


class ProgramError(Exception):
    """Lines that have run on DynamicCache fail when they are run again."""


@dataclasses.dataclass
class Side:
    """One cache with its model, and what the lines of a program see.

    Attributes
    ----------
    scope : dict
        Names and values.
    shown : list
        What `show` was called with since the last comparison.
    """

    scope: dict[str, Any]
    shown: list[Any]

    @classmethod
    def of(cls, program: Program, pikv: bool) -> "Side":
        model = model_of(program.family, program.all_experts, program.attention, pikv)
        shown: list[Any] = []
        scope: dict[str, Any] = {**WORDS, "model": model, "pikv": pikv, "kept": None}
        scope["ids"], scope["mask"] = tokens(program.batch, 0, 0), ones(program.batch, 0)
        scope["fresh"] = functools.partial(new_cache, model, pikv, program.attached, program.devices, program.options)
        scope["assistant"] = assistant_of(program.family, program.all_experts)
        scope["show"] = lambda value, where=None: shown.append((value, where))
        scope["cache"] = scope["fresh"]()
        return cls(scope, shown)

    def execute(self, text: str) -> Exception | None:
        """Run lines; where they fail, the names are what they were."""
        before = dict(self.scope)
        self.shown.clear()
        try:
            with torch.no_grad():
                exec(_compiled(text), self.scope)
        except Exception as error:
            self.scope.clear()
            self.scope.update(before)
            return error
        return None

    def lengths(self) -> tuple[int, int | None]:
        """Return the cache's length and rows."""
        cache = self.scope["cache"]
        filled = [layer for layer in cache.layers if layer.is_initialized]
        rows = next((layer.batch if isinstance(layer, PiKVLayer) else layer.keys.shape[0] for layer in filled), None)
        length = cache.get_seq_length()
        return length, rows if length else None


@functools.lru_cache(4096)
def _compiled(text: str) -> Any:
    return compile(text, "program", "exec")


@dataclasses.dataclass
class Report:
    """What came of a program.

    Attributes
    ----------
    texts : list of str
        The lines of each call that was made.
    failure : str or None
        What differs, None if nothing does.
    kind : str
        Of the failure, without numbers.
    ends : str
        How it ended: `"same"`, or why it ended early.
    refused : list of str
        Kinds of the calls that were refused.
    calls : int
        How many were made.
    why : str
        What DynamicCache fails in.
    """

    texts: list[str] = dataclasses.field(default_factory=list)
    failure: str | None = None
    kind: str = ""
    ends: str = "same"
    refused: list[str] = dataclasses.field(default_factory=list)
    calls: int = 0
    why: str = ""


def view_of(program: Program, side: Side, ours: Side) -> View:
    """Return what an operation may know of the state."""
    ids, mask = side.scope["ids"], side.scope["mask"]
    windowed = FAMILIES[program.family].sliding
    return View(
        batch=ids.shape[0],
        length=ids.shape[1],
        past=side.scope["cache"].get_seq_length(),
        hidden=not bool(mask.all()),
        kept=side.scope["kept"] is not None,
        one_attention=program.family in ATTENTION,
        windowed=windowed,
        sliding=windowed and program.options.get("sliding_layers") != "paged",
        attached=program.attached,
        routed=FAMILIES[program.family].routed,
        eager=side.scope["model"].config._attn_implementation == "eager",
        autocast=program.autocast,
        in_place=ours.scope["model"].config._attn_implementation == "pikv",
        cache_options={"devices": program.devices, **program.options},
    )


def run(program: Program) -> Report:
    """Run a program on both caches; a call that is refused changes nothing, and the others go on."""
    report, accepted = Report(), []
    theirs, ours = Side.of(program, pikv=False), Side.of(program, pikv=True)
    for call in (*program.calls, LAST):
        text = "\n".join(ALPHABET[call.name].write(view_of(program, theirs, ours), SimpleNamespace(**call.arguments)))
        if not text:
            continue
        report.texts.append(text)
        report.calls += 1
        their_error = theirs.execute(text)
        before = ours.lengths()
        our_error = ours.execute(text)
        if their_error is not None:
            report.ends = "both fail" if our_error is not None else "only DynamicCache fails"
            report.why = f"{call.name}: {type(their_error).__name__}: {their_error}"
            return report
        if our_error is not None:
            kind = refusal(call, our_error, report.texts)
            if kind is None:
                return _failed(report, call, f"{type(our_error).__name__}: {our_error}")
            # Refused is a model's call: the outer of two goes no further, and neither does what makes several.
            half_way = kind == "fast memory too small" or _ends_too_early(call)
            is_part = call.name == "nested" or (call.name == "generate" and half_way)
            if ours.lengths() != before and is_part:
                report.ends = "interrupted"
                return report
            if ours.lengths() != before:
                return _failed(report, call, f"after a refusal (length, rows) {ours.lengths()}, before {before}")
            report.refused.append(kind)
            report.texts[-1] = _as_refused(text)
            theirs = _replayed(program, accepted)
            continue
        accepted.append(text)
        if (found := compare(theirs, ours)) is not None:
            if _unsteady(program, accepted, found, theirs):
                lower = any(_in_float32(text) != text for text in accepted)
                report.ends = "as close as lower precision is" if lower else "unsteady"
                return report
            return _failed(report, call, found.message)
    return report


def _as_refused(text: str) -> str:
    handler = (
        "except (ValueError, TypeError, NotImplementedError, RuntimeError) as refusal:\n    print('refused:', refusal)"
    )
    return f"try:\n{textwrap.indent(text, '    ')}\n{handler}"


def _without_numbers(message: str) -> str:
    """Return what messages of a kind have in common."""
    for what in (r"/\S+/cache", r"\[\[.*?\]\]", r"[-+]?\d[\d.e+-]*"):
        message = re.sub(what, "#", message)
    return message[:100]


def _failed(report: Report, call: Call, message: str) -> Report:
    report.kind = f"{call.name}: " + _without_numbers(message)
    report.failure, report.ends = message, "FAIL"
    return report


def _ends_too_early(call: Call) -> bool:
    """Return whether newer releases may begin a call, assisted decoding with a filled cache, with too short a mask."""
    return not KEEPS and call.arguments.get("how") == "assistant"


def refusal(call: Call, error: Exception, texts: Sequence[str]) -> str | None:
    """Return the kind of a refusal that a call may meet after these lines and its own; None for other errors."""
    if not isinstance(error, ValueError | TypeError | NotImplementedError | RuntimeError):
        return None
    for kind, (words, cause) in REFUSALS.items():
        # Of what is refused in the middle of a call only this is known.
        if type(error) is RuntimeError and kind != "latents of other weights":
            continue
        if re.search(words, str(error)) and any(re.search(cause, text) for text in texts):
            shows = call.arguments.get("mask") in ("show", "short") or _ends_too_early(call)
            return kind if shows or kind != "padding shown later" else None
    return None


def _replayed(program: Program, texts: Sequence[str]) -> Side:
    side = Side.of(program, pikv=False)
    for text in texts:
        if (error := side.execute(text)) is not None:
            raise ProgramError(text) from error
    return side


def compare(theirs: Side, ours: Side) -> Difference | None:
    """Return what differs between the sides after a call."""
    for index, ((a, where), (b, _)) in enumerate(zip(ours.shown, theirs.shown, strict=True)):
        if (found := difference(a, b, where)) is not None:
            return dataclasses.replace(found, index=index)
    if (a := ours.lengths()) != (b := theirs.lengths()):
        return Difference(f"(length, rows) {a}, not {b}")
    return None


def _in_float32(text: str) -> str:
    for lower in (CONTEXTS["autocast"], "model.to(torch.float16)", "model.to(torch.bfloat16)"):
        text = text.replace(lower, "if True:" if lower.endswith(":") else "")
    return text


def _alternatives(program: Program, texts: Sequence[str]) -> Iterator[list[Any] | None]:
    """Yield what DynamicCache's last call shows in transformers' other attention, and where rounding differs.

    Attention differs in what it makes of padding, which a mask may show later to layers that keep it. Rounding differs
    in float32, and with slightly other weights. None is of other tokens, for which later lines were not written.
    """
    if program.family not in ATTENTION:
        other = {"eager": "sdpa", "sdpa": "eager"}[program.attention]
        yield _shown_again(dataclasses.replace(program, attention=other), texts)
    wide = [_in_float32(text) for text in texts]
    if lower := wide != list(texts):
        yield _shown_again(program, wide)
    for seed in range(4):
        torch.manual_seed(seed)
        model = model_of(program.family, program.all_experts, program.attention, False)
        weights = model.get_input_embeddings().weight
        kept = weights.detach().clone()
        weights.data.mul_(1 + (4e-3 if lower else 3e-6) * torch.randn_like(weights))
        try:
            yield _shown_again(program, texts)
        finally:
            weights.data.copy_(kept)


def _shown_again(program: Program, texts: Sequence[str]) -> list[Any] | None:
    try:
        return _replayed(program, texts).shown
    except ProgramError:
        return None


def _unsteady(program: Program, texts: Sequence[str], found: Difference, theirs: Side) -> bool:
    """Return whether rounding changes DynamicCache's own result, half as much as PiKVCache differs from it."""
    if found.index is None:
        return False
    if found.tokens and math.isinf(found.gap) and any(_in_float32(text) != text for text in texts):
        # Drawn, or of beams: rounding to lower precision decides.
        return True
    value, where = theirs.shown[found.index]
    alternatives = list(_alternatives(program, texts))
    others = [shown[found.index][0] for shown in alternatives if shown is not None]
    differences = [difference(other, value, where) for other in others]
    if found.tokens and (None in alternatives or any(each is not None and each.tokens for each in differences)):
        return True
    noise = max([0.5 * found.allowed, *(farthest(other, value, where) for other in others)])
    return found.off <= 2 * noise and found.gap <= 4 * noise
