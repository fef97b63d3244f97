"""One line about a package that is missing, with what installs it."""

import pytest

from pikv_hf.common.extras import EXTRAS, MissingExtraError, extra
from pikv_hf.eval.errors import InputError
from pikv_hf.eval.runner import caches


def test_a_missing_package_of_the_extra_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(EXTRAS, "eval", ("no_such_package",))
    with pytest.raises(MissingExtraError) as caught, extra("eval", needed_by="pikv report"):
        import no_such_package.inside  # noqa: F401
    assert str(caught.value) == 'pikv report needs no_such_package: pip install ".[eval]" in a clone of pikv-hf'
    assert caught.value.name == "no_such_package"


def test_whoever_asked_first_is_told_of_their_extra(monkeypatch):
    monkeypatch.setitem(EXTRAS, "eval", ("kvpress", "no_such_package"))
    monkeypatch.setitem(EXTRAS, "kvpress", ("no_such_package",))
    refused = pytest.raises(MissingExtraError, match=r"^pikv eval needs no_such_package.*\[eval\]")
    with refused, extra("eval", needed_by="pikv eval"), extra("kvpress", needed_by="kvpress's presses"):
        import no_such_package  # noqa: F401


@pytest.mark.parametrize("error", [ModuleNotFoundError("no module", name="no_such_package"), ImportError("broken")])
def test_other_errors_pass(error):
    with pytest.raises(ImportError) as caught, extra("kvpress", needed_by="a test"):
        raise error
    assert caught.value is error


def test_a_missing_backend_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setattr(caches, "_installed", lambda module: False)
    with pytest.raises(InputError, match=r'needs optimum\.quanto: pip install "\.\[quanto\]" in a clone of pikv-hf$'):
        caches.cache_factory("quantized:quanto:4")
