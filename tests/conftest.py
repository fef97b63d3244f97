"""Settings for all tests."""

import gc
import os
import warnings
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "pikv",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
    # A failing run is deterministic; shrinking it would take minutes of a test run that is kept short.
    phases=(Phase.explicit, Phase.generate),
)
settings.load_profile("pikv")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip what is marked as slow, and say so at the end")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Skipped, not deselected: workers of xdist tell of nothing that they deselect.
    for item in items if config.getoption("--fast") else ():
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: make test runs it"))


def pytest_collection_finish() -> None:
    """Spare the collector what imports made.

    It would look through a million objects that never become garbage, in each of the many collections that tests ask
    for: more than half of the time of those.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    # Libraries that count their objects at the end would report them.
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread_each() -> None:
    # The suite runs one process per core.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_model() -> tuple[Any, Any]:
    """Return the bundled model and its tokenizer."""
    from pikv_hf.eval.runner.models import load_model

    return load_model(device="cpu")


@pytest.fixture(autouse=True)
def _small_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # The pages of small models are so small that they would all be gathered, and none read in place.
    monkeypatch.setattr("pikv_hf.page_table.table_view.MIN_RUN_BYTES", 1)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")
    torch.manual_seed(0)
