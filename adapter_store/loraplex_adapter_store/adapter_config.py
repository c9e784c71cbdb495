"""``adapter_config.json``, read with types: a wrong type is an error that names the key.

A config remembers which of its fields were read. ``families.config_fields`` refuses the others, so
that no option of a trainer is passed over silently.
"""

from __future__ import annotations

from collections.abc import Mapping

from .bounded_regex import BoundedRegex
from .errors import MalformedFile, UnsupportedAdapter
from .limits import StoreLimits
from .safetensors_reader import parse_json_object

__all__ = ["AdapterConfig"]


class AdapterConfig:
    """View of the decoded JSON; belongs to one read. ``values`` is all of it, marked as unread."""

    def __init__(self, values: Mapping[str, object]) -> None:
        if values.get("auto_map") or values.get("auto_mapping_code"):
            raise UnsupportedAdapter("adapter_config.json asks to run code (auto_map): refused")
        self.values = values
        self.regex = BoundedRegex()  # for every pattern of this config
        self._read: set[str] = set()

    @staticmethod
    def parse(data: bytes, limits: StoreLimits) -> AdapterConfig:
        return AdapterConfig(
            parse_json_object(data, "adapter_config.json", limits.max_config_bytes)
        )

    @property
    def unread(self) -> Mapping[str, object]:
        """The fields that nobody asked for and that are set to something."""
        return {
            key: value
            for key, value in self.values.items()
            if key not in self._read and not (value is None or value is False or _is_empty(value))
        }

    @property
    def peft_type(self) -> str:
        value = self.get("peft_type")
        if not isinstance(value, str):
            raise MalformedFile("adapter_config.json has no peft_type")
        return value.upper()

    def is_set(self, key: str) -> bool:
        """True unless the value is absent, null, false, empty or zero."""
        return bool(self.get(key))

    def get(self, key: str) -> object:
        """The value of any type; None if it is absent or null."""
        self._read.add(key)
        return self.values.get(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def names(self, key: str) -> tuple[str, ...] | str | None:
        """A list of strings, one string (a regex, or a shorthand), or None."""
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, dict) and all(isinstance(on, bool) for on in value.values()):
            return tuple(name for name, on in value.items() if on)  # MoE-PEFT's {name: bool}
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a string or a list of strings")
        return tuple(value)

    def pattern(self, key: str) -> Mapping[str, float]:
        """rank_pattern and alpha_pattern: regex → number."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(
            isinstance(number, int | float) and not isinstance(number, bool)
            for number in value.values()
        ):
            raise self._wrong(key, "an object of numbers")
        return value

    def section(self, key: str) -> AdapterConfig | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return AdapterConfig(value)

    def overridden_by(self, section: AdapterConfig) -> AdapterConfig:
        """This config with the fields of ``section`` in place of its own."""
        merged = AdapterConfig({**self.values, **section.values})
        merged.regex, merged._read = self.regex, self._read
        return merged

    def _wrong(self, key: str, needed: str) -> MalformedFile:
        return MalformedFile(
            f"adapter_config.json: {key} is {self.values.get(key)!r}, {needed} is needed"
        )


def _is_empty(value: object) -> bool:
    return isinstance(value, str | list | dict) and not value
