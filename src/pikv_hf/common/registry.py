"""Registries: classes by the names that an option of the configuration may have."""

from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol, TypeVar


class Named(Protocol):
    """A class with the name that it is registered under."""

    name: ClassVar[str]


_Class = TypeVar("_Class", bound=Named)


class Registry(dict[str, type[_Class]]):
    """Classes by the names that an option may have.

    Parameters
    ----------
    option : str
        The option.
    names : iterable of str
        What it may be; the configuration says so, and nothing else can be registered.
    """

    def __init__(self, option: str, names: Iterable[str]) -> None:
        super().__init__()
        self._option, self._names = option, tuple(names)

    def register(self, name: str) -> Callable[[type[_Class]], type[_Class]]:
        """Register the decorated class under a name, and set its attribute `name`.

        Raises
        ------
        ValueError
            If the configuration does not know the name.
        """
        if name not in self._names:
            raise ValueError(f"{self._option}={name!r} is none of {', '.join(map(repr, self._names))} in config.py")

        def add(named: type[_Class]) -> type[_Class]:
            named.name = name
            self[name] = named
            return named

        return add
