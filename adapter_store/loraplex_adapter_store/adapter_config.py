"""``adapter_config.json``, read with types: a wrong type is an error that names the key."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import MalformedFile, UnsupportedAdapter
from .limits import StoreLimits
from .safetensors_reader import parse_json_object

__all__ = ["AdapterConfig"]


class AdapterConfig:
    """Immutable view of the decoded JSON."""

    def __init__(self, values: Mapping[str, object]) -> None:
        if values.get("auto_map") or values.get("auto_mapping_code"):
            raise UnsupportedAdapter("adapter_config.json asks to run code (auto_map): refused")
        self.values = values

    @staticmethod
    def parse(data: bytes, limits: StoreLimits) -> AdapterConfig:
        return AdapterConfig(
            parse_json_object(data, "adapter_config.json", limits.max_config_bytes)
        )

    @property
    def peft_type(self) -> str:
        value = self.values.get("peft_type")
        if not isinstance(value, str):
            raise MalformedFile("adapter_config.json has no peft_type")
        return value.upper()

    def is_set(self, key: str) -> bool:
        """True unless the value is absent, null, false, empty or zero."""
        return bool(self.values.get(key))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def names(self, key: str) -> tuple[str, ...] | str | None:
        """A list of strings, one string (a regex, or a shorthand), or None."""
        value = self.values.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, dict) and all(isinstance(on, bool) for on in value.values()):
            return tuple(name for name, on in value.items() if on)  # MoE-PEFT's {name: bool}
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a string or a list of strings")
        return tuple(value)

    def pattern(self, key: str) -> Mapping[str, float]:
        """rank_pattern and alpha_pattern: regex → number."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(
            isinstance(number, int | float) and not isinstance(number, bool)
            for number in value.values()
        ):
            raise self._wrong(key, "an object of numbers")
        return value

    def section(self, key: str) -> AdapterConfig | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return AdapterConfig(value)

    def _wrong(self, key: str, needed: str) -> MalformedFile:
        return MalformedFile(
            f"adapter_config.json: {key} is {self.values.get(key)!r}, {needed} is needed"
        )
