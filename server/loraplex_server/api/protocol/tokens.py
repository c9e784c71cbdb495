"""POST /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from .body import Body, Few, JsonObject, Name, TokenId, exactly_one_of
from .chat import MAX_MESSAGES, ChatMessage
from .generation import AdapterChoice
from .tools import ToolDefinition

__all__ = ["DetokenizeBody", "Detokenized", "TokenizeBody", "Tokenized"]


class TokenizeBody(Body):
    """Either ``prompt`` or ``messages``."""

    model_config = exactly_one_of(prompt="string", messages="array")

    model: Name | None = None
    adapter: AdapterChoice | None = None
    prompt: str | None = None
    messages: Annotated[Few[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    tools: Annotated[Few[ToolDefinition], Field(max_length=128)] | None = None
    return_token_strs: bool | None = None


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(Body):
    model: Name | None = None
    tokens: Annotated[Few[TokenId], Field(max_length=140_000)]


class Detokenized(BaseModel):
    prompt: str
