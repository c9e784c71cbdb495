"""Defaults for requests, from an adapter's card."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from loraplex_server.errors import invalid

_Marker = Annotated[str, Field(min_length=1, max_length=64)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SamplingDefaults(_Part):
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None


class ReasoningMarkers(_Part):
    open: _Marker
    close: _Marker


class AdapterDefaults(_Part):
    """Defaults of a card. A request overrides them; missing fields have the base's defaults."""

    system_prompt: Annotated[str, Field(max_length=32_768)] | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=262_144)] | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    stop: Annotated[list[_Stop], Field(max_length=16)] | None = None
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=1024)] | None = None
    reasoning: ReasoningMarkers | Literal[False] | None = None  # False: answers have no reasoning
    response_template: dict[str, JsonValue] | None = None  # transformers' format, literals only
    auto: Literal["always", "with_tools", "never"] | None = None  # when ``auto`` may choose it

    @field_validator("logit_bias")
    @classmethod
    def _check_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 12):
                raise ValueError(f"{key[:40]!r} is not a token id")
        return bias

    @field_validator("response_template")
    @classmethod
    def _check_template(cls, template: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        if template is not None:
            _refuse_patterns(template)
            load_response_template(template)  # raises ValueError
        return template


def read_defaults(values: Mapping[str, JsonValue]) -> AdapterDefaults:
    """Read a card's defaults. Raises ApiError (400), which names the field."""
    try:
        return AdapterDefaults.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str | int))
        param = f"defaults.{where}".rstrip(".")
        raise invalid(f"{param}: {first['msg']}", param) from error


def merged(
    present: Mapping[str, JsonValue], patch: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """Apply a JSON merge patch (RFC 7396): null removes a field, objects are merged."""
    result: dict[str, Any] = dict(present)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            old = result.get(key)
            result[key] = merged(old if isinstance(old, dict) else {}, value)
        else:
            result[key] = value
    return result


def _refuse_patterns(value: JsonValue) -> None:
    """Raises ValueError for a schema with regular expressions, which could run forever."""
    if isinstance(value, list):
        for item in value:
            _refuse_patterns(item)
    if isinstance(value, dict):
        for key, item in value.items():
            if key.endswith("_pattern"):
                raise ValueError(f"{key!r} is a regular expression; use literal markers")
            _refuse_patterns(item)
