"""Whether the installed PEFT is one that the installed transformers works with."""

import pytest
from packaging.version import Version


def _is_too_old() -> bool:
    import peft
    from transformers.integrations.peft import MIN_PEFT_VERSION

    return Version(peft.__version__) < Version(MIN_PEFT_VERSION)


needs_peft = pytest.mark.skipif(_is_too_old(), reason="this transformers asks for a newer PEFT than is installed")
