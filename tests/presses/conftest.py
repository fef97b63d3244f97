"""Families whose tokens in a cache no press can score with the installed transformers."""

import functools

import pytest
from families import FAMILIES

from pikv_hf.integration.latent_attention import expands_latents

#: With latent attention.
LATENT = {"deepseek_v2", "deepseek_v3"}


@functools.cache
def caches_latents() -> bool:
    return any(expands_latents(type(module)) for module in FAMILIES["deepseek_v2"].build().modules())


@pytest.fixture(autouse=True)
def _tokens_have_keys(request: pytest.FixtureRequest) -> None:
    """Skip latent attention where latents are cached; that presses refuse it then is a test of its own."""
    given = getattr(getattr(request.node, "callspec", None), "params", {}).values()
    asked = LATENT & {each for each in given if isinstance(each, str)} or "latent_family" in request.fixturenames
    if asked and caches_latents():
        pytest.skip("this transformers caches latents, which no press can score yet")


@pytest.fixture
def latent_family() -> str:
    """Return a family with latent attention, for tests of what it has beside that."""
    return "deepseek_v2"
