"""Bodies and answers of embeddings, pooling, classes, scores and ranks, as OpenAI and vLLM."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from .body import INT64_END, Body, Few, JsonObject, exactly_one_of
from .chat import ChatMessages
from .completion import PromptInput
from .generation import AdapterBody, AnsweredBy, CacheSalt

_Dimensions = Annotated[int, Field(ge=1, lt=INT64_END)]
_Encoding = Literal["float", "base64"]
PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]


class VectorBody(AdapterBody):
    """The common fields of vectors, classes and scores."""

    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=INT64_END)] | None = None  # -1: to fit
    truncation_side: Literal["left", "right"] | None = None  # the side that is cut; default: right
    use_activation: bool | None = None  # False: raw outputs of the model
    cache_salt: CacheSalt | None = None


class InputItem(Body):
    """An image, as a ``data:`` URL or in base64, or a text."""

    model_config = exactly_one_of(image="string", text="string")

    image: str | None = None
    text: str | None = None


def _kind_of_item(value: object) -> str:
    return "dict" if isinstance(value, dict | InputItem) else "str"


def _kind_of_input(value: object) -> str:
    """Return the only alternative that an error should speak about."""
    if isinstance(value, list):
        return "list" if any(_kind_of_item(item) == "dict" for item in value) else "str"
    return _kind_of_item(value)


_Item = Annotated[
    Annotated[str, Tag("str")] | Annotated[InputItem, Tag("dict")], Discriminator(_kind_of_item)
]
_Items = Annotated[Few[_Item], Field(min_length=1)]
VectorInput = Annotated[
    Annotated[PromptInput, Tag("str")]
    | Annotated[InputItem, Tag("dict")]
    | Annotated[_Items, Tag("list")],
    Discriminator(_kind_of_input),
]
ImageInput = str | InputItem | _Items


class InputBody(VectorBody):
    """A body with either ``input`` or ``messages``."""

    model_config = exactly_one_of(input=["string", "array", "object"], messages="array")

    input: VectorInput | None = None
    add_special_tokens: bool | None = None
    messages: ChatMessages | None = None
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


class ZeroShotBody(VectorBody):
    """Images, and the texts that they are compared with."""

    input: ImageInput
    labels: Annotated[Few[str], Field(min_length=1)]
    # with {} in place of the label, as "a photo of a {}"; null: the label itself
    template: Annotated[str, Field(max_length=1000)] | None = None


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


# The names of the two sides of a pair. A body has exactly one of these pairs.
NAMES_OF_PAIRS = (
    *(("text_1", "text_2"), ("data_1", "data_2")),
    *(("queries", "documents"), ("queries", "items")),
)
_Texts = str | Annotated[Few[str], Field(min_length=1)]


class ScoreBody(VectorBody):
    """Pairs of texts: 1 with 1, 1 with n, or n with n."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {name: {"type": ["string", "array"]} for name in names},
                    "required": list(names),
                }
                for names in NAMES_OF_PAIRS
            ]
        }
    )

    text_1: _Texts | None = None
    text_2: _Texts | None = None
    data_1: _Texts | None = None
    data_2: _Texts | None = None
    queries: _Texts | None = None
    documents: _Texts | None = None
    items: _Texts | None = None


class DocumentBody(Body):
    text: str


class RerankBody(VectorBody):
    query: str
    documents: str | Annotated[Few[str | DocumentBody], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0, lt=INT64_END)] | None = None  # 0: all
    return_documents: bool | None = None  # null: true


class Score(BaseModel):
    index: int
    object: Literal["score"]
    score: float


class Scores(VectorAnswer):
    data: list[Score]


class Document(BaseModel):
    text: str


class RankedDocument(BaseModel):
    index: int  # in the request
    document: Document | None = None  # absent with return_documents: false
    relevance_score: float


class Reranked(BaseModel):
    id: str
    model: str
    usage: PromptUsage
    results: list[RankedDocument]
