"""Let kvpress say once what it says for every sample."""

import logging

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
