"""POST /v1/route and GET /v1/adapters/{name}/routing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .body import Body, Few, exactly_one_of
from .chat import MAX_MESSAGES, ChatMessage
from .tools import ToolDefinition

__all__ = ["ExpertRouting", "Route", "RouteBody"]


class RouteBody(Body):
    """Either a text or chat messages, with the tools that the request offers."""

    model_config = exactly_one_of(input="string", messages="array")

    input: Annotated[str, Field(max_length=100_000)] | None = None
    messages: Annotated[Few[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    tools: Annotated[Few[ToolDefinition], Field(max_length=128)] | None = None


class Route(BaseModel):
    """Further fields explain the choice: candidates, scores, threshold."""

    model_config = ConfigDict(extra="allow")

    object: Literal["route"]
    method: Literal["auto"]


class ExpertRouting(BaseModel):
    """Further fields hold the rows per expert of each routed place."""

    model_config = ConfigDict(extra="allow")

    object: Literal["adapter.routing"]
    name: str
    digest: str
    family: str
