"""POST /v1/completions."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from loraplex_server.settings.config import MAX_INPUTS

from .body import INT64_END, Few, TokenId, shown
from .generation import (
    MAX_LOGPROBS,
    AnsweredBy,
    FinishReason,
    GenerationBody,
    PromptLogprobs,
    Usage,
)


def check_prompt(value: object) -> object:
    """Name the first wrong item. The union below would list every item four times."""
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError("a list must not be empty")
    kinds = set(map(type, value))
    if kinds == {int}:
        return value
    if len(value) > MAX_INPUTS and not kinds.isdisjoint({str, list}):
        raise ValueError(f"{len(value)} prompts are more than the {MAX_INPUTS} of one call")
    if kinds == {str}:
        return value
    first = type(value[0])
    for number, item in enumerate(value):
        if type(item) not in (str, int, list) or type(item) is not first:
            raise ValueError(
                "a prompt is a text, a list of texts, a list of token ids or a list of such "
                f"lists, not a list with {shown(item)} as item {number}"
            )
        if isinstance(item, list) and not set(map(type, item)) <= {int}:
            wrong = next(token for token in item if type(token) is not int)
            raise ValueError(
                f"item {number} is a list of token ids, not a list with {shown(wrong)}"
            )
    return value


PromptInput = Annotated[
    str
    | Annotated[Few[str], Field(min_length=1)]
    | Annotated[Few[TokenId], Field(min_length=1)]
    | Annotated[Few[Few[TokenId]], Field(min_length=1)],
    BeforeValidator(check_prompt),
]


class CompletionBody(GenerationBody):
    prompt: PromptInput
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, JsonValue] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None  # absent unless requested, like the next two fields
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    adapter: AnsweredBy | None
    loraplex: dict[str, JsonValue] | None = None
