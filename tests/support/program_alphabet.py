"""All calls that programs are made of."""

# Each adds its own.
import program_asides  # noqa: F401
import program_calls  # noqa: F401
import program_changes  # noqa: F401
from program_operation import OPERATIONS

ALPHABET = OPERATIONS
