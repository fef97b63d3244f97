"""How budgets of a cache are written, and what is refused."""

from typing import Any

import pytest

from pikv_hf import PiKVConfig
from pikv_hf.common.budget import Budget, parse_bytes


@pytest.mark.parametrize(
    ("given", "amount", "unit"),
    [
        (0.25, 0.25, "share"),
        ("25%", 0.25, "share"),
        (" 12.5 % ", 0.125, "share"),
        (4096, 4096, "tokens"),
        ("4096 tokens", 4096, "tokens"),
        ("1 token", 1, "tokens"),
        ("2GiB", 2 << 30, "bytes"),
        ("1.5 mb", 1_500_000, "bytes"),
    ],
)
def test_budgets_are_read_as_users_write_them(given: Any, amount: float, unit: str) -> None:
    assert Budget.parse(given) == Budget(amount, unit)  # type: ignore[arg-type]
    assert PiKVConfig.from_json(PiKVConfig(budget=given).to_json()).budget == given


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            "2 pounds",
            ValueError,
            r"a share \(.*'25%'\), tokens \(.*'4096 tokens'\) or bytes .* got '2 pounds'",
        ),
        ("4096", ValueError, "got '4096'"),
        ("-25%", ValueError, "got '-25%'"),
        (1.0, ValueError, "budget=1.0 is everything, which is kept without a budget: leave it out"),
        ("100%", ValueError, "budget='100%' is everything"),
        ("150%", ValueError, "above 0 and below 1, got '150%'"),
        (4096.0, ValueError, "below 1, got 4096.0; a number of tokens is written without a point: 4096"),
        (float("nan"), ValueError, "below 1, got nan"),
        (0, ValueError, "a budget in tokens must be at least 1, got 0"),
        ("0.4 B", ValueError, "a budget in bytes must be at least 1, got '0.4 B'"),
        (True, TypeError, r"got True \(bool\)"),
        ([0.25], TypeError, r"got \[0.25\] \(list\)"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Budget.parse(given)


@pytest.mark.parametrize("text", ["25%", "7 tokens", "7", "GiB", "1 pound"])
def test_bytes_are_bytes(text: str) -> None:
    with pytest.raises(ValueError, match=f"a limit must be a number with one of B, KB, .*, got {text!r}"):
        parse_bytes(text, "a limit")
