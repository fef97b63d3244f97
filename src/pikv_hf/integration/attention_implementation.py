"""The names of attention in configs: PiKV's, and which others it may take the place of."""

from collections.abc import Callable
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_NAME = "pikv"
#: What transformers' continuous batching makes of it, and leaves in the model's config.
BATCHED_NAME = f"paged|{ATTENTION_NAME}"

#: Where transformers has its attention functions, from which hub kernels of flash attention are called too. What else
#: it has, sparse attention say, computes another function.
_ATTENTION = {
    f"transformers.integrations.{name}"
    for name in ("sdpa_attention", "flash_attention", "flex_attention", "sdpa_paged", "flash_paged", "eager_paged")
}
_MASKS = {"transformers.masking_utils"}
#: kvpress puts a function of its own around all that are registered when it is imported.
_WRAPPER, _WRAPPED = "kvpress.attention_patch", "func"


class AttachedImplementation(str):
    """The name of PiKV's attention, as a config has it; a copy of the config has what was there before, `previous`."""

    __slots__ = ("previous",)
    previous: Any

    def __new__(cls, previous: Any) -> "AttachedImplementation":
        """Return :data:`ATTENTION_NAME`."""
        name = super().__new__(cls, ATTENTION_NAME)
        name.previous = previous
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model is not attached, and may be unpickled where PiKV's attention is not registered.
        return (type(None), ()) if self.previous is None else (str, (self.previous,))


def check_may_replace(reader: str, name: str | None) -> None:
    """Raise `ValueError` for an attention implementation whose results PiKV's would not have.

    Parameters
    ----------
    reader : str
        Who asks for it: a layer, or the model around.
    name : str or None
        As the config has it. None and names that are not registered, `"eager"` one of them, mean the attention
        in the model's own code.
    """
    for kind, registered, own in (
        ("attention", ALL_ATTENTION_FUNCTIONS, _ATTENTION),
        ("mask", ALL_MASK_ATTENTION_FUNCTIONS, _MASKS),
    ):
        function = registered.get(name)
        if function is not None and (where := _written_in(function)) not in own:
            raise ValueError(
                f"{reader} uses attn_implementation={name!r}, whose {kind} function, from {where}, is not "
                "transformers' own: PiKV's attention cannot take its place. PiKVCache(config=model.config) works with "
                'it; or let go of it first: model.set_attn_implementation("sdpa")'
            )


def _written_in(function: Callable[..., Any]) -> str:
    """Return the module that a function's code is in, which wrappers that pass for another function do not hide."""
    names: dict[str, Any] = getattr(function, "__globals__", {})
    where = str(names.get("__name__", type(function).__module__))
    if where == _WRAPPER:
        inside = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if _WRAPPED in inside:
            return _written_in(inside[_WRAPPED].cell_contents)
    return where
