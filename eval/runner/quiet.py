"""Let kvpress say once what it says for every sample, and transformers nothing where nobody wants to know."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

#: Loggers that repeat themselves each time a press is made or entered.
_LOGGERS = (
    "kvpress.presses.base_press",
    "kvpress.presses.kvzip_press",
    "kvpress.presses.kvgrad_press",
    "kvpress.pipeline",
)


class _Once(logging.Filter):
    """Lets each message through the first time."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in self._seen:
            return False
        self._seen.add(message)
        return True


def warn_once() -> None:
    """Let kvpress's loggers print each message only once. May be called again; it then changes nothing."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Once) for known in logger.filters):
            logger.addFilter(_Once())


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice and progress bars off the terminal for a while."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
