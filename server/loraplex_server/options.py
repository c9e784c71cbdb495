"""Declares an option once, as a field of the part of the server that it configures.

``settings.sources`` and ``cli.serve`` derive the command line, the LORAPLEX_* environment, the YAML
file and docs/settings.md from these declarations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, JsonValue, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_settings import NoDecode


class Panel(StrEnum):
    """The heading under which an option is listed."""

    MODEL = "Model"
    HTTP = "HTTP"
    ENGINE = "Engine"
    ADAPTERS = "Adapters"


@dataclass(frozen=True, slots=True)
class Option:
    """One option: ``--max-model-len``, ``LORAPLEX_MAX_MODEL_LEN``, ``max-model-len:``."""

    name: str  # max_model_len
    field: str  # name of the owner's field
    owner: type[Options]
    info: FieldInfo
    panel: Panel
    metavar: str | None

    @property
    def dashed(self) -> str:
        return self.name.replace("_", "-")

    @property
    def help(self) -> str:
        return self.info.description or ""

    @property
    def is_flag(self) -> bool:
        return self.info.annotation is bool

    @property
    def default(self) -> str:
        """The default as text. Empty if the help names the default, or there is none."""
        default = self.info.default
        if default is None or default == () or "Default:" in self.help:
            return ""
        if isinstance(default, bool):
            return "on" if default else "off"
        if self.metavar == "SIZE":
            return f"{default >> 30}GiB" if default >= 1 << 30 else f"{default >> 20}MiB"
        return f"{default:g}" if isinstance(default, float) else str(default)


class Options(BaseModel):
    """The options of one owner. Frozen. A bad value raises ValueError."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, coerce_numbers_to_str=True
    )
    panel: ClassVar[Panel]  # of the options that name no other

    def __init_subclass__(cls, panel: Panel = Panel.HTTP, **kwargs: Any) -> None:
        cls.panel = panel
        super().__init_subclass__(**kwargs)


def option(
    default: Any,  # like pydantic's Field
    help_text: str,
    *,
    panel: Panel | None = None,  # if it is not the owner's
    name: str | None = None,  # if it differs from the field's name
    metavar: str | None = None,
    **bounds: Any,  # ge, le: like pydantic's Field
) -> Any:  # type checkers take the field for its default
    extra: dict[str, JsonValue] = {"panel": panel, "name": name, "metavar": metavar}
    return Field(default=default, description=help_text, json_schema_extra=extra, **bounds)


def options(owners: Iterable[type[Options]]) -> list[Option]:
    """Return every option of the owners, in the order of their declaration."""
    declared = []
    for owner in owners:
        for field, info in owner.model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and "panel" in extra:
                name = str(extra["name"] or field)
                panel = Panel(str(extra["panel"] or owner.panel))
                metavar = extra["metavar"] or ("SIZE" if field.endswith("_bytes") else None)
                shown = None if metavar is None else str(metavar)
                declared.append(Option(name, field, owner, info, panel, shown))
    return declared


def _split(value: object) -> object:
    """Split a text at its commas. Other values stay."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _expand(value: object) -> object:
    if isinstance(value, list | tuple):
        return [Path(str(item)).expanduser() for item in value]
    return value


_BYTE_SIZE = TypeAdapter(ByteSize)


def _size(value: object) -> object:
    """Convert 1024, "2GiB" or "2GB" to bytes. A single ``g`` is a decimal gigabyte."""
    if isinstance(value, bool):
        raise ValueError("a size such as 512MiB or 2GB is needed")
    if isinstance(value, str) and value.strip().lower().endswith(("k", "m", "g")):
        value = f"{value.strip()}b"
    return int(_BYTE_SIZE.validate_python(value))


Bytes = Annotated[int, BeforeValidator(_size)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Texts = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_expand), BeforeValidator(_split)]
