"""Constructors that name their own arguments and pass all others on to their base's."""

from __future__ import annotations

import inspect
import typing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack
else:  # annotations are not evaluated: Python 3.10 does without
    Unpack = getattr(typing, "Unpack", None)


class _Signature:
    """The arguments of a class, those that it passes on among them; its objects have none."""

    def __get__(self, instance: object | None, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # of a module it would be that of its call
        found: dict[str, inspect.Parameter] = {}
        for kind in owner.__mro__:
            if "__init__" not in vars(kind):
                continue
            _, *own = inspect.signature(vars(kind)["__init__"]).parameters.values()
            rest = [p for p in own if p.kind is p.VAR_KEYWORD]
            found = {**{p.name: p for p in own if p not in rest}, **found}
            if not rest:
                break
        return inspect.Signature(sorted(found.values(), key=lambda p: p.kind))


class PassesOn:
    """A class whose constructors may have ``**options`` for the arguments of their base's.

    ``help`` and ``inspect.signature`` show them all.
    """

    __signature__ = _Signature()

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The arguments that have a default, with it."""
        parameters = cls.__signature__.parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}
