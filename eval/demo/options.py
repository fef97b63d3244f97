"""What ``pikv demo`` was asked to do. Free of torch, so that the command line's help is quick."""

import dataclasses
from pathlib import Path

from pikv_hf.config import PiKVConfig
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.output_files import check_output_file
from pikv_hf.eval.runner.options import MOST_THREADS

DTYPES = ("float32", "float16", "bfloat16")
#: Smaller than `PiKVConfig`'s own, as the text is short: of 2,048 tokens, pages that are not full would be a good part.
SMALL_PAGES = PiKVConfig(page_size=16, recent_window=64, num_shards=4)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What ``pikv demo`` was asked to do.

    Parameters
    ----------
    model : str, optional
        Folder or Hub name; the bundled reference model by default.
    text : Path, optional
        File with the context; by default a synthetic haystack with needles.
    questions : tuple of str
        Questions about `text`.
    tokens : int
        Length of the haystack with its questions and answers, in tokens of the reference tokenizer.
    seed : int
        Of the haystack.
    max_new_tokens : int
        Limit of each answer.
    dtype : str, optional
        One of `DTYPES`; by default the one the model was saved in.
    device : str, optional
        By default the first GPU, else the CPU.
    threads : int
        CPU threads of torch.
    record_trace : Path, optional
        File to write the routing of the run to; see :mod:`pikv_hf.planning.simulate.routing_trace`.
    pikv : PiKVConfig
        Storage options of the PiKV caches.
    cache_devices : tuple of str
        Devices of its shards, or `("auto",)`; by default where the model is.

    Raises
    ------
    InputError
        For a number below 1, an unknown dtype, a text without questions and the reverse, or no folder for the trace.
    """

    model: str | None = None
    text: Path | None = None
    questions: tuple[str, ...] = ()
    tokens: int = 2048
    seed: int = 0
    max_new_tokens: int = 48
    dtype: str | None = None
    device: str | None = None
    threads: int = 2
    record_trace: Path | None = None
    pikv: PiKVConfig = SMALL_PAGES
    cache_devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokens", "max_new_tokens", "threads"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.threads > MOST_THREADS:
            raise InputError(f"--threads must be at most {MOST_THREADS}, got {self.threads}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.text is not None and not self.questions:
            raise InputError(f"--text {self.text} needs at least one --question")
        if self.questions and self.text is None:
            raise InputError("--question needs --text, the file that it is about")
        if self.record_trace is not None and not self.record_trace.parent.is_dir():
            raise InputError(f"--record-trace {self.record_trace}: no folder {self.record_trace.parent}")
        check_output_file(self.record_trace, "--record-trace")


def tier_limits(text: str) -> dict[str, str | int | None]:
    """Read `"cpu=4MiB,disk"`: tiers with their limits, or without one."""
    limits: dict[str, str | int | None] = {}
    for part in text.split(","):
        name, _, limit = part.partition("=")
        limits[name.strip()] = limit.strip() or None
    return limits
