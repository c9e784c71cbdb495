"""POST /v1/embeddings, /pooling and /classify: bodies as OpenAI and vLLM have them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from .body import INT64_END, Body, Few, JsonObject, Name, exactly_one_of
from .chat import MAX_MESSAGES, ChatMessage
from .completion import PromptInput
from .generation import AdapterChoice, AnsweredBy

__all__ = [
    "Classification",
    "ClassifyBody",
    "EmbeddingList",
    "EmbeddingsBody",
    "PoolingBody",
    "PoolingList",
    "PoolingTask",
    "PromptUsage",
    "VectorBody",
]

_Dimensions = Annotated[int, Field(ge=1, lt=INT64_END)]
_Encoding = Literal["float", "base64"]
PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]


class VectorBody(Body):
    """What every route has whose answer is vectors, classes or scores."""

    model: Name | None = None
    adapter: AdapterChoice | None = None
    adapter_id: Name | None = None  # LoRAX
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64_END)] | None = None  # -1: to fit
    truncation_side: Literal["left", "right"] | None = None  # what is cut off; right by default
    use_activation: bool | None = None  # False: as the model computes it
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


class InputBody(VectorBody):
    """Either ``input`` or ``messages``."""

    model_config = exactly_one_of(input=["string", "array"], messages="array")

    input: PromptInput | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[Few[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)] | None = (
        None
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None


class EmbeddingsBody(InputBody):
    encoding_format: _Encoding | None = None
    embed_dtype: Literal["float32"] | None = None  # of base64
    endianness: Literal["native", "little"] | None = None  # of base64
    dimensions: _Dimensions | None = None


class PoolingBody(EmbeddingsBody):
    task: PoolingTask | None = None


class ClassifyBody(InputBody):
    pass


class PromptUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class VectorAnswer(BaseModel):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: PromptUsage
    adapter: AnsweredBy | None


class Embedding(BaseModel):
    index: int
    object: Literal["embedding"]
    embedding: list[float] | str  # str: base64 of little-endian float32


class EmbeddingList(VectorAnswer):
    data: list[Embedding]


class Pooled(BaseModel):
    index: int
    object: Literal["pooling"]
    data: list[float] | list[list[float]] | str


class PoolingList(VectorAnswer):
    data: list[Pooled]


class TextClass(BaseModel):
    index: int
    label: str  # the most probable one
    probs: list[float]  # in the order of the adapter's labels
    num_classes: int


class Classification(VectorAnswer):
    data: list[TextClass]
