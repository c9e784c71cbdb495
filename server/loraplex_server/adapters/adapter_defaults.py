"""What an adapter's card says about requests that do not say it themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

__all__ = ["AdapterDefaults", "DefaultsRefused", "ReasoningMarkers", "merged", "read_defaults"]

_Marker = Annotated[str, Field(min_length=1, max_length=64)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class DefaultsRefused(ValueError):
    """``param`` is where in the defaults the mistake is."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(f"{param}: {problem}")
        self.param = param


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
    """Absent fields are the base's. The request wins over all of them."""

    system_prompt: Annotated[str, Field(max_length=32_768)] | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=262_144)] | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    stop: Annotated[list[_Stop], Field(max_length=16)] | None = None
    logit_bias: Annotated[dict[str, _Bias], Field(max_length=1024)] | None = None
    reasoning: ReasoningMarkers | Literal[False] | None = None  # False: the answer has none
    response_template: dict[str, JsonValue] | None = None  # transformers' format, literals only
    auto: Literal["always", "with_tools", "never"] | None = None  # when it may be chosen

    @field_validator("logit_bias")
    @classmethod
    def _check_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or {}:
            if not (key.isascii() and key.isdigit() and len(key) < 12):
                raise ValueError(f"{key[:40]!r} is not a token id")
        return bias

    @field_validator("response_template")
    @classmethod
    def _check_template(cls, given: dict[str, JsonValue] | None) -> dict[str, JsonValue] | None:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        if given is not None:
            _refuse_patterns(given)
            load_response_template(given)  # ValueError
        return given


def read_defaults(given: Mapping[str, JsonValue]) -> AdapterDefaults:
    """Raises DefaultsRefused."""
    try:
        return AdapterDefaults.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, str | int))
        raise DefaultsRefused(f"defaults.{where}".rstrip("."), first["msg"]) from error


def merged(
    present: Mapping[str, JsonValue], patch: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """A JSON merge patch (RFC 7396): null takes a field away, objects are merged."""
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
    """A regular expression of a client could run for ever."""
    if isinstance(value, list):
        for item in value:
            _refuse_patterns(item)
    if isinstance(value, dict):
        for key, item in value.items():
            if key.endswith("_pattern"):
                raise ValueError(f"{key!r} is a regular expression; use literal markers")
            _refuse_patterns(item)
