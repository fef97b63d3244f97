"""Attaching a model for a cache that is being made."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .attachment import Attachment, attachment_of, being_attached, detach, ensure_attached


@contextmanager
def attached_for_cache(model: Any, placement: str) -> Iterator[Attachment]:
    """Attach a model and count the cache that is made in this block; if none is, leave the model as it was."""
    with being_attached:
        before = attachment_of(model)
        was_active = before is not None and before.active
        attachment = ensure_attached(model, placement)
        made = attachment.caches_made
        attachment.count_cache()
    try:
        yield attachment
    except BaseException:
        with being_attached:
            attachment.caches_made -= 1
            # Another thread may have made one meanwhile.
            if not was_active and attachment.caches_made == made:
                detach(model)
        raise
