"""A plugin of pytest, `-p without_kvpress`: a run in which kvpress cannot be imported, as where it is not installed."""

import sys

assert "kvpress" not in sys.modules, "kvpress is imported already"
sys.modules["kvpress"] = None  # type: ignore[assignment]


def pytest_report_header() -> str:
    return "kvpress cannot be imported in this run"
