"""Warnings point at the line of whoever called, through packages in between."""

import types
import warnings

from pikv_hf.common.user_line import user_stacklevel


def test_packages_in_between_are_passed_over() -> None:
    def in_package(name: str, body: str, **known: object) -> types.FunctionType:
        namespace = {"__name__": name, **known}
        exec(f"def run(): {body}", namespace)
        return namespace["run"]  # type: ignore[return-value]

    warn = in_package("pikv_hf.cache", "warn('there', stacklevel=level())", warn=warnings.warn, level=user_stacklevel)
    forward = in_package("torch.nn.modules", "inner()", inner=warn)
    model = in_package("transformers.models", "inner()", inner=forward)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model()
    assert caught[0].filename == __file__
