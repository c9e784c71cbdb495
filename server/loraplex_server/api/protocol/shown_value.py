"""A value of a body as an error shows it: short, and as JSON has it."""

from __future__ import annotations

import reprlib

__all__ = ["shown"]


class _Shown(reprlib.Repr):
    """Inputs may be megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = 60
        self.maxlist = self.maxdict = 4
        self.maxlevel = 2

    def repr_NoneType(self, value: None, level: int) -> str:  # noqa: N802  reprlib calls it so
        return "null"

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_float(self, value: float, level: int) -> str:
        return repr(value)

    def repr_instance(self, value: object, level: int) -> str:
        return "a file"  # of a form: JSON has nothing else


shown = _Shown().repr
