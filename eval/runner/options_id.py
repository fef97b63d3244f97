"""Make a short name for a set of options."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return eight hexadecimal digits that differ for different options."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:8]
