"""Name methods by what tells them apart, and say once what their runs have in common."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pikv_hf.eval.report.groups import method_of
from pikv_hf.eval.report.summary_file import Summary

Value = TypeVar("Value")

#: Caches by the first word of how they are asked for, as labels call them.
_CACHES = {"dynamic": "DynamicCache", "pikv": "PiKVCache"}
_ON_PIKV = re.compile(r"(^|\son\s)PiKVCache(\s\w+=\S+)*$")
_ASKED_TOGETHER = " (query-aware)"


@dataclass(frozen=True, slots=True)
class Traits:
    """What a run was made with, but for its budget: runs alike in it are one method.

    Attributes
    ----------
    name : str
        The press, or the cache where there is none.
    press : bool
        Whether there is a press.
    cache : str
        Kind of cache, such as `PiKVCache`.
    options : tuple of (str, str)
        Of the cache, in the order given.
    dtype : str
        Of the model; empty where the file does not say, or all runs of the model have one.
    query_aware : bool
        Whether the press saw the question.
    batch : str
        Questions at a time; empty where the file does not say.
    """

    name: str
    press: bool
    cache: str
    options: tuple[tuple[str, str], ...]
    dtype: str
    query_aware: bool
    batch: str


@dataclass(frozen=True, slots=True)
class Common:
    """What most methods have: values, and none where no value is most methods'.

    Attributes
    ----------
    cache : str or None
        Kind of cache of presses.
    options : tuple of (str, str)
        Of `PiKVCache`.
    dtype, batch : str or None
        See `Traits`.
    query_aware : bool or None
        See `Traits`; of presses.
    """

    cache: str | None
    options: tuple[tuple[str, str], ...]
    dtype: str | None
    query_aware: bool | None
    batch: str | None

    def notes(self, traits: Traits) -> tuple[str, ...]:
        """Return what a method has that is not common."""
        own, common = dict(traits.options), dict(self.options)
        different = {name: value for name, value in own.items() if common.get(name) != value}
        absent = [name for name in common if name not in own] if traits.cache == _CACHES["pikv"] else []
        on = f"on {traits.cache}" if traits.press and traits.cache != self.cache else ""
        default = f"default {', '.join(absent)}" if absent else ""
        if absent and len(absent) == len(common):
            default = "else default" if own else "default options"
        aware = "" if traits.query_aware == (self.query_aware or False) else _asked(traits.query_aware)
        dtype = traits.dtype if traits.dtype != self.dtype else ""
        batch = f"batch {traits.batch}" if traits.batch and traits.batch != self.batch else ""
        return tuple(filter(None, (on, *_written(different), default, aware, dtype, batch)))

    def sentence(self, methods: Sequence[Traits], models: str) -> str:
        """Say what is common in words, and whether some of the methods differ from it.

        `models` says in what dtypes models ran that each ran in one; else it is empty.
        """
        options, paged = ", ".join(_written(dict(self.options))), _CACHES["pikv"]
        caches = f"presses on {self.cache}" if self.cache else ""
        if options and self.cache == paged:
            caches, options = f"{caches} with {options}", ""
        facts = [
            models or (f"model in {self.dtype}" if self.dtype else ""),
            f"batches of {self.batch}" if self.batch not in (None, "", "1") else "",
            _asked(self.query_aware) if self.query_aware is not None else "",
            caches,
            f"{paged} with {options}" if options else "",
        ]
        said = "; ".join(filter(None, facts))
        rest = ", unless a row says otherwise" if any(map(self._differs, methods)) else ""
        return said and f"{said[0].upper()}{said[1:]}{rest}."

    def _differs(self, traits: Traits) -> bool:
        """Whether a method has another value of what is said; options of its own are no such thing."""
        own, paged = dict(traits.options), traits.cache == _CACHES["pikv"]
        return (
            (self.dtype is not None and traits.dtype != self.dtype)
            or (self.batch is not None and traits.batch != self.batch)
            or (traits.press and self.query_aware is not None and traits.query_aware != self.query_aware)
            or (traits.press and self.cache is not None and traits.cache != self.cache)
            or (paged and any(own.get(name) != value for name, value in self.options))
        )


def traits_of(summary: Summary) -> Traits:
    """Return what a run was made with; names come from its label, without the ratio and the cache's options."""
    method = method_of(summary.label, summary).removesuffix(_ASKED_TOGETHER)
    cache, options = _cache(summary, method)
    if cache == _CACHES["pikv"]:
        method = _ON_PIKV.sub("", method) or cache
    elif summary.press is not None:
        method = method.removesuffix(f" on {cache}")
    dtype, batch = (str(summary.conditions.get(name) or "") for name in ("dtype", "batch_size"))
    return Traits(method, summary.press is not None, cache, options, dtype, summary.query_aware, batch)


def common_options(methods: Sequence[Traits]) -> Common:
    """Return what more than half of the methods have."""
    pressed = [traits for traits in methods if traits.press]
    paged = [dict(traits.options) for traits in methods if traits.cache == _CACHES["pikv"]]
    names = dict.fromkeys(name for options in paged for name in options)
    usual = {name: _usual(options.get(name) for options in paged) for name in names}
    return Common(
        cache=_usual(traits.cache for traits in pressed),
        options=tuple((name, value) for name, value in usual.items() if value is not None),
        dtype=_usual(traits.dtype for traits in methods),
        query_aware=_usual(traits.query_aware for traits in pressed),
        batch=_usual(traits.batch for traits in methods),
    )


def _cache(summary: Summary, method: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return kind and options; a cache that is not known by name is called what the label calls it."""
    name, _, rest = summary.cache.partition(":")
    if name in _CACHES:
        parts = (part.partition("=") for part in rest.split(",") if part.strip())
        return _CACHES[name], tuple((option.strip(), value.strip()) for option, _, value in parts)
    return (method.rpartition(" on ")[2] if summary.press is not None else method), ()


def _usual(values: Iterable[Value]) -> Value | None:
    counted = Counter(values)
    for value, count in counted.most_common(1):
        return value if 2 * count > counted.total() else None
    return None


def _written(options: dict[str, str]) -> list[str]:
    """Options as `name=value`; one codec for keys and values is one codec."""
    both = {"key_codec", "value_codec"}
    if both <= options.keys() and options["key_codec"] == options["value_codec"]:
        rest = {name: value for name, value in options.items() if name not in both}
        options = {"codec": options["key_codec"], **rest}
    return [f"{name}={value}" for name, value in options.items()]


def _asked(together: bool) -> str:
    return "question read with the context" if together else "question unseen while the context is read"
