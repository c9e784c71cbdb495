"""How an option is declared: once, as a field of the part of the server that it configures.

The command line, the LORAPLEX_* environment, the YAML file and docs/settings.md are made from
these declarations by ``settings_sources`` and ``cli.serve``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, JsonValue, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode

__all__ = ["Bytes", "Option", "Options", "Panel", "Paths", "Seconds", "Texts", "option", "options"]


class Panel(StrEnum):
    """Under which heading an option is listed."""

    MODEL = "Model"
    HTTP = "HTTP"
    ENGINE = "Engine"
    ADAPTERS = "Adapters"


@dataclass(frozen=True, slots=True)
class Option:
    """One option: ``--max-model-len``, ``LORAPLEX_MAX_MODEL_LEN``, ``max-model-len:``."""

    name: str  # max_model_len
    field: str  # of the owner
    owner: type[Options]
    info: FieldInfo
    panel: Panel
    metavar: str | None
    hidden: bool

    @property
    def dashed(self) -> str:
        return self.name.replace("_", "-")

    @property
    def help(self) -> str:
        return self.info.description or ""

    @property
    def is_flag(self) -> bool:
        return self.info.annotation is bool


class Options(BaseModel):
    """The options of one owner. Frozen; a bad value raises ValueError."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, coerce_numbers_to_str=True
    )


def option(
    default: Any,  # as pydantic's Field takes it
    help_text: str,
    panel: Panel,
    *,
    name: str | None = None,  # where it differs from the field's
    metavar: str | None = None,
    hidden: bool = False,
    **bounds: Any,  # ge, le: as pydantic's Field takes them
) -> Any:  # the value of a field that a type checker takes for a default
    extra: dict[str, JsonValue] = {
        "panel": panel.value,
        "name": name,
        "metavar": metavar,
        "hidden": hidden,
    }
    return Field(default=default, description=help_text, json_schema_extra=extra, **bounds)


def options(owners: Iterable[type[Options]]) -> list[Option]:
    """Every option of the owners, in the order of their declaration."""
    found = []
    for owner in owners:
        for field, info in owner.model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and "panel" in extra:
                name = extra["name"] or field
                metavar = extra["metavar"]
                panel, hidden = Panel(str(extra["panel"])), bool(extra["hidden"])
                shown = None if metavar is None else str(metavar)
                found.append(Option(str(name), field, owner, info, panel, shown, hidden))
    return found


def _split(value: object) -> object:
    """One text with commas is a list of texts."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _expand(value: object) -> object:
    if isinstance(value, list | tuple):
        return [Path(str(item)).expanduser() for item in value]
    return value


_BYTE_SIZE = TypeAdapter(ByteSize)


def _size(value: object) -> object:
    """1024, "2GiB" or "2GB" to bytes; a lone ``g`` is a decimal gigabyte."""
    if isinstance(value, bool):
        raise ValueError("a size such as 512MiB or 2GB is needed")
    if isinstance(value, str) and value.strip().lower().endswith(("k", "m", "g")):
        value = f"{value.strip()}b"
    return int(_BYTE_SIZE.validate_python(value))


Bytes = Annotated[int, BeforeValidator(_size)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_expand), BeforeValidator(_split)]
