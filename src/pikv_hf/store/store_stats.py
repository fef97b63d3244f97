"""What a store of contexts has saved, and what it holds."""

import dataclasses
from typing import Any

from ..reports.fitting_table import as_text, light_table


@dataclasses.dataclass(slots=True)
class StoreStats:
    """Counts since the store was made; `str()` or `print()` shows a table.

    Attributes
    ----------
    hits, misses : int
        Prompts of which a prefix was known, and those of which nothing was.
    not_reusable : int
        Prompts that were generated from without the store: see docs/store.md.
    tokens_reused, tokens_read : int
        Of prompts.
    tokens_unreachable : int
        Known ones that were read all the same: they end between checkpoints of layers that cannot be cropped, or their
        caches have evicted tokens.
    tokens_loaded : int
        From files.
    seconds_saved : float
        What reading the reused tokens would have taken at the mean speed of those that :meth:`generate` read.
    seconds_read : float
        What reading took.
    entries, tokens_stored : int
        Now; tokens that entries share count once.
    nbytes : int
        Of all entries, shared pages once, and of free pages of their pools.
    evictions : int
        Entries that went for the budget.
    files, file_bytes : int
        Now, in the folder of the model as it is.
    errors : int
        How often a file could not be read or written.
    """

    hits: int = 0
    misses: int = 0
    not_reusable: int = 0
    tokens_reused: int = 0
    tokens_read: int = 0
    tokens_unreachable: int = 0
    tokens_loaded: int = 0
    seconds_saved: float = 0.0
    seconds_read: float = 0.0
    entries: int = 0
    tokens_stored: int = 0
    nbytes: int = 0
    evictions: int = 0
    files: int = 0
    file_bytes: int = 0
    errors: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return as_text(self.__rich__())

    def __rich__(self) -> Any:
        table = light_table("Contexts", show_header=False)
        prompts = self.hits + self.misses
        share = f" ({self.hits / prompts:.0%})" if prompts else ""
        table.add_row("prompts with a known prefix", f"{self.hits:,} of {prompts:,}{share}")
        if self.not_reusable:
            table.add_row("prompts past the store", f"{self.not_reusable:,}")
        table.add_row("tokens reused, read", f"{self.tokens_reused:,}, {self.tokens_read:,}")
        if self.tokens_unreachable:
            table.add_row("tokens known, but behind a checkpoint", f"{self.tokens_unreachable:,}")
        table.add_row("seconds saved, about; spent reading", f"{self.seconds_saved:,.1f}; {self.seconds_read:,.1f}")
        table.add_row("entries", f"{self.entries:,} of {self.tokens_stored:,} tokens, {self.nbytes:,} bytes")
        if self.files or self.tokens_loaded:
            table.add_row("files", f"{self.files:,}, {self.file_bytes:,} bytes; {self.tokens_loaded:,} tokens loaded")
        if self.errors:
            table.add_row("files that failed", f"{self.errors:,}")
        table.add_row("evicted", f"{self.evictions:,} entries")
        return table
