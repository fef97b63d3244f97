"""Check what an evaluation is asked to do, from the command line, Python or a YAML file; free of torch."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from pikv_hf.common.suggest import did_you_mean
from pikv_hf.eval.errors import InputError, user_input
from pikv_hf.eval.runner.options_id import fingerprint

SUITES = ("ruler", "longbench", "perplexity", "needle")
WORDINGS = ("auto", "ruler", "reference")
#: More are a slip of the finger; the system may refuse them, or grind to a halt.
MOST_THREADS = 1024
#: Per task; all are made before the first is asked.
MOST_SAMPLES = 100_000

#: Change how long a run takes, not what comes out of it.
_ONLY_SPEED = ("threads", "device", "batch_size")
#: Have a place of their own in the folder's name.
_IN_NAME = ("suite", "model", "cache", "press", "ratio", "query_aware", "e", "length", *_ONLY_SPEED)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """One evaluation run.

    Parameters
    ----------
    suite : str
        One of `SUITES`.
    model : str
        `reference` for the bundled model, a folder, or a name on the Hub.
    cache : str
        `dynamic`, `quantized:BACKEND:BITS`, `pikv` or `pikv:option=value,...`.
    press : str, optional
        A press of this project or of kvpress, `PiKVPress` or `AdaKVPress(SnapKVPress(window_size=32))`.
    ratio : float, optional
        Share of the cache that the press removes.
    query_aware : bool
        Whether the question is read with the context, by plain `generate`, instead of after it was compressed.
    tasks : tuple of str
        Tasks or sets of the suite; empty for all of them.
    length : int
        Tokens of a sample (RULER), of a window (perplexity).
    samples : int
        Per task (RULER), per cell (needle), or windows (perplexity).
    limit : int, optional
        Most samples of the whole run, or per set (LongBench).
    seed : int
        Of all randomness.
    batch_size : int
        Samples read at once, padded on the left.
    max_new_tokens : int, optional
        Instead of the suite's own limit.
    max_context : int, optional
        Longest context in tokens; LongBench's are cut in the middle to it. By default the model's positions.
    wording : str
        `ruler` for the paper's words, `reference` for those of the bundled model, `auto` for what fits the model.
    haystack, squad, hotpotqa : str, optional
        Files (or a folder, for `haystack`) to use instead of the bundled texts.
    hub : bool
        Take RULER's ready-made samples from the Hub.
    data_dir : str, optional
        Folder of LongBench's `.jsonl` files, or `bundled` for the small sample; by default the Hub.
    prompts : str, optional
        LongBench's own `dataset2prompt.json`, for figures comparable with published ones.
    e : bool
        LongBench-E instead of LongBench.
    lengths, depths : tuple
        Of the needle grid: tokens, and percent of the text before the needle.
    text : str, optional
        File whose perplexity is measured; by default the bundled text.
    prefill : int
        Tokens of a window that are read, and compressed, before the rest is scored.
    chunk : int
        Tokens scored at once.
    dtype, device, attn_implementation : str, optional
        Of the model.
    threads : int, optional
        CPU threads; by default torch's choice.

    Raises
    ------
    InputError
        For an unknown suite, a number out of range, or options that exclude each other.
    """

    suite: str
    model: str = "reference"
    cache: str = "dynamic"
    press: str | None = None
    ratio: float | None = None
    query_aware: bool = False
    tasks: tuple[str, ...] = ()
    length: int = 1024
    samples: int = 20
    limit: int | None = None
    seed: int = 42
    batch_size: int = 1
    max_new_tokens: int | None = None
    max_context: int | None = None
    wording: str = "auto"
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    hub: bool = False
    data_dir: str | None = None
    prompts: str | None = None
    e: bool = False
    lengths: tuple[int, ...] = (512, 1024, 2048)
    depths: tuple[float, ...] = (0, 12.5, 25, 37.5, 50, 62.5, 75, 87.5, 100)
    text: str | None = None
    prefill: int = 512
    chunk: int = 128
    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("suite", SUITES), ("wording", WORDINGS)):
            if (value := getattr(self, name)) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, choices)}"
                )
        for name in ("length", "samples", "limit", "batch_size", "max_new_tokens", "max_context", "chunk", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        for name, most in (("threads", MOST_THREADS), ("samples", MOST_SAMPLES)):
            if (value := getattr(self, name)) is not None and value > most:
                raise InputError(f"{name} must be at most {most:,}, got {value:,}")
        if any(length < 1 for length in self.lengths):
            raise InputError(f"lengths must be at least 1, got {', '.join(map(str, self.lengths))}")
        if any(not 0 <= depth <= 100 for depth in self.depths):
            raise InputError(f"depths must be in percent, 0 to 100, got {', '.join(map(str, self.depths))}")
        if self.press is None and self.ratio:
            raise InputError(f"ratio {self.ratio} needs a press")
        if self.press is not None and self.batch_size > 1:
            raise InputError(f"a press needs batch_size 1, got {self.batch_size}: presses do not know about padding")
        if self.suite == "perplexity":
            self._check_windows()

    def _check_windows(self) -> None:
        if not 0 <= self.prefill < self.length - 1:
            raise InputError(f"prefill must be at least 0 and below length - 1 = {self.length - 1}, got {self.prefill}")
        if self.press is not None and self.prefill == 0:
            raise InputError("a press needs tokens to compress: prefill must be at least 1, got 0")
        if self.batch_size > 1:
            raise InputError(f"perplexity is measured window by window, got batch_size {self.batch_size}")
        if self.query_aware:
            raise InputError("perplexity asks no question, so query_aware has no meaning")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> "EvalOptions":
        """Build options from plain values, lists where tuples belong; unknown names raise with a suggestion."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise InputError(
                    f"unknown option {name!r}{did_you_mean(name, known)} (known: {', '.join(sorted(known))})"
                )
        if "suite" not in options:
            raise InputError(f"the option suite is missing, one of {', '.join(SUITES)}")
        hints = get_type_hints(cls)
        return cls(**{name: _typed(name, value, hints[name]) for name, value in options.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values, tuples as lists."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def result_options(self) -> dict[str, Any]:
        """Return the options that decide the result."""
        return {name: value for name, value in self.to_dict().items() if name not in _ONLY_SPEED}

    @property
    def dataset(self) -> str:
        """What kvpress calls the suite."""
        names = {"needle": "needle_in_haystack", "longbench": "longbench-e" if self.e else "longbench"}
        return names.get(self.suite, self.suite)

    @property
    def variant(self) -> str:
        """What kvpress calls the data set's folder: a length, or the only set of LongBench; else empty."""
        if self.suite == "longbench":
            return self.tasks[0] if len(self.tasks) == 1 else ""
        return "" if self.suite == "needle" else str(self.length)

    def folder_name(self, ratio: float) -> str:
        """Return kvpress's name for the results' folder, with what has no place in that added as a fingerprint."""
        press = self.press or "no_press"
        parts = [self.dataset, self.variant, self.model, press, f"{ratio:.2f}"]
        parts += [] if self.cache == "dynamic" else [self.cache]
        parts += ["query_aware"] if self.query_aware else []
        defaults = EvalOptions(suite=self.suite, length=self.length, prefill=0).to_dict() | {"prefill": 512}
        rest = {
            name: value for name, value in self.to_dict().items() if name not in _IN_NAME and value != defaults[name]
        }
        parts += [fingerprint(rest)] if rest else []
        return "__".join(_for_a_path(part) for part in parts if part)


def read_options(file: Path) -> list[EvalOptions]:
    """Read the runs that a YAML file describes.

    The file is a mapping of options. Under `runs` it may hold a list of mappings, each of which starts from the others.
    An option that takes one value may be given a list of them: the run is then repeated for each, and for each
    combination where there are several.

    Raises
    ------
    InputError
        For a missing or unreadable file, an unknown option, or a value of the wrong type; the message names the file.
    """
    with user_input(f"cannot read {file}"):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"cannot read {file}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a mapping of options, got {type(content).__name__}")
    runs = content.pop("runs", [{}])
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise InputError(f"runs in {file} must be a list of mappings of options, got {runs!r}")
    grid = [one for run in runs for one in _expanded(content | run)]
    try:
        return [EvalOptions.from_dict(one) for one in grid]
    except InputError as error:
        raise InputError(f"in {file}: {error}") from None


def _expanded(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    hints = get_type_hints(EvalOptions)
    lists = {
        name: value
        for name, value in options.items()
        if isinstance(value, list) and name in hints and not _is_tuple(hints[name])
    }
    for values in itertools.product(*lists.values()):
        yield options | dict(zip(lists, values, strict=True))


def _typed(name: str, value: Any, hint: Any) -> Any:
    if _is_tuple(hint):
        given = value if isinstance(value, list | tuple) else [value]
        element = get_args(hint)[0]
        return tuple(_typed(name, each, element) for each in given)
    allowed = get_args(hint) or (hint,)
    if isinstance(value, bool) and bool not in allowed:
        raise InputError(f"{name} must be {_names(allowed)}, got {value!r}")
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, int) and float in allowed and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, allowed):
        raise InputError(f"{name} must be {_names(allowed)}, got {value!r}")
    return value


def _is_tuple(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is tuple


def _names(types: tuple[Any, ...]) -> str:
    return " or ".join("empty" if kind is type(None) else kind.__name__ for kind in types)


def _for_a_path(part: str) -> str:
    """Return `part` with nothing in it that a file system or a shell takes for something else."""
    kept = part.replace("/", "--").replace("(", "-").replace(")", "")
    return "".join(letter if letter.isalnum() or letter in "-_.=," else "-" for letter in kept).strip("-.")
