"""Do not wait for a Hub that cannot be reached: what is cached is used, the rest is missing at once."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds after which the Hub counts as out of reach.
PATIENCE = 3.0
_DEFAULT_ENDPOINT = "https://huggingface.co"


def hub_answers(timeout: float = PATIENCE) -> bool:
    """Return whether the Hub, or what `HF_ENDPOINT` names instead, answers anything at all.

    Parameters
    ----------
    timeout : float
        Seconds to wait.
    """
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:
        # A certificate that is not believed comes from somebody who answered; the Hub's own client may believe it.
        return "CERTIFICATE" in str(error)
    return True


@contextmanager
def impatient_hub() -> Iterator[None]:
    """Work from the Hub's cache alone if the Hub does not answer, instead of retrying each request for half a minute.

    Libraries look at `HF_HUB_OFFLINE` when they are imported, so theirs is set, and set back afterwards.
    """
    import huggingface_hub.constants

    known = huggingface_hub.constants
    before = known.HF_HUB_OFFLINE
    known.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    finally:
        known.HF_HUB_OFFLINE = before
