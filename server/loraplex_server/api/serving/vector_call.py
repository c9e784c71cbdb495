"""What all calls for vectors, classes and scores share: checks, the source, the prompts."""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import ClassVar, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from loraplex_adapter_store.plan import Activation, HeadPlan, HeadTask
from loraplex_adapter_store.selector import Auto, Description
from loraplex_server.api.errors import invalid
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.vectors import InputBody, VectorBody
from loraplex_server.api.state import AppState

from .chat_prompt import ChatPrompt
from .completion import split_prompts
from .disconnect import unless_client_leaves
from .unsupported import refuse_unsupported
from .vector_source import AdapterVectors, Cut, EncoderVectors, Ids, VectorSource

__all__ = ["Inputs", "VectorCall", "activated", "head_for", "in_turns"]

T = TypeVar("T")
_ITEMS_A_TURN = 32  # worked on before other calls have their turn


class VectorCall(ABC):
    """One call. The constructor checks what needs neither adapter nor tokens."""

    id_prefix: ClassVar[str]
    prompt_param: str  # the field that holds the texts, for errors
    needs_head: bool = False  # without one the call has no answer

    def __init__(self, state: AppState, request: Request, body: VectorBody, n_inputs: int) -> None:
        """Raises ApiError."""
        self.info, self.record = state.begin_call(request)
        refuse_unsupported(body.model_extra or {})
        state.unknown_fields.warn(body.model_extra or ())
        state.lifecycle.check_admitting()
        self.state = state
        self.request = request
        if self.info.meter is not None:
            self.info.meter.check_tokens()
        limit = state.config.http.max_inputs
        if n_inputs > limit:
            raise invalid(
                f"{n_inputs} texts are more than the {limit} of one call", self.prompt_param
            )
        self.cut = Cut(body.truncate_prompt_tokens, body.truncation_side)
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._body = body

    @property
    @abstractmethod
    def routing_text(self) -> str:
        """What ``auto`` looks at."""

    @abstractmethod
    async def answer(self, source: VectorSource) -> bytes:
        """The JSON. Raises ApiError."""

    async def respond(self) -> Response:
        """A client that leaves stops the work."""
        return ORJSONResponse(await unless_client_leaves(self._run(), self.request.receive))

    async def _run(self) -> bytes:
        source = await self._source()
        try:
            return await self.answer(source)
        finally:
            source.close()

    async def _source(self) -> VectorSource:
        state, body = self.state, self._body
        if state.encoder is not None and body.model == state.encoder.name:
            if body.adapter is not None or body.adapter_id:
                raise invalid(
                    f"adapters are of {state.resolver.base_name}; {body.model} has none", "adapter"
                )
            return EncoderVectors(state, self.info, state.encoder)
        started = perf_counter()
        asked = state.resolver.parse(
            model=body.model, adapter=body.adapter, adapter_id=body.adapter_id
        )
        if self.needs_head and isinstance(asked.selector, Auto | Description):
            finds = "'auto' chooses" if isinstance(asked.selector, Auto) else "a description makes"
            raise invalid(f"{finds} adapters that write text; name a classifier", asked.param)
        resolved = await state.resolver.resolve(asked, self.routing_text, self.info.access)
        self.info.chose(resolved.header, resolved.chosen_by)
        return AdapterVectors(
            state,
            self.info,
            resolved,
            self.record,
            call_id=self.id,
            model=asked.model,
            adapter_param=asked.param,
            cache_salt=body.cache_salt,
            load_s=perf_counter() - started,
            prompt_param=self.prompt_param,
        )

    async def write(
        self,
        source: VectorSource,
        items: Iterable[Mapping[str, object]],
        n_tokens: int,
    ) -> bytes:
        """The answer with ``items`` as its data."""
        head: dict[str, object] = {
            "id": self.id,
            "object": "list",
            "created": self.state.now(),
            "model": source.model,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
            "adapter": source.adapter,
        }
        written = await in_turns(
            orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY) for item in items
        )
        return orjson.dumps(head)[:-1] + b',"data":[' + b",".join(written) + b"]}"


class Inputs:
    """``input`` or ``messages`` of a body."""

    def __init__(self, body: InputBody) -> None:
        """Raises ApiError (400)."""
        if (body.input is None) == (body.messages is None):
            raise invalid("give either input or messages", "input")
        self._body = body
        self._texts: list[str] = []
        self._id_lists: list[Ids] = []
        self._chat: ChatPrompt | None = None
        if body.input is not None:
            self._texts, self._id_lists = split_prompts(body.input)
        if body.messages is not None:
            self._chat = ChatPrompt(
                body.messages,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs=body.chat_template_kwargs,
                asks_for_answer=False,
            )

    def __len__(self) -> int:
        return len(self._texts) or len(self._id_lists) or 1

    @property
    def routing_text(self) -> str:
        return "\n".join(self._texts) if self._chat is None else self._chat.routing_text

    async def prompts(self, source: VectorSource, cut: Cut) -> list[Ids]:
        """Tokenised, and no longer than they may be. Raises ApiError (400)."""
        if self._chat is not None:
            return cut.apply([await source.encode_chat(self._chat)], source, "messages")
        if self._texts:
            special = self._body.add_special_tokens is not False
            return await source.encode(self._texts, param="input", special=special, cut=cut)
        for ids in self._id_lists:
            source.check_ids(ids, "input")
        return cut.apply(self._id_lists, source, "input")


def head_for(source: VectorSource, task: HeadTask, route: str) -> HeadPlan:
    """The head that ``route`` needs. Raises ApiError (400): never vectors of the base instead."""
    head = source.head
    if head is None:
        raise invalid(
            f"{route} needs a classifier ({task.value}), and {source.label} has no head; train "
            "one with PEFT's task_type",
            source.adapter_param,
            "adapter_has_no_head",
        )
    if head.task is not task:
        other = {HeadTask.SEQ_CLS: "/classify", HeadTask.TOKEN_CLS: "/pooling"}[head.task]
        raise invalid(
            f"{route} needs a {task.value} head, and {source.label} has one of "
            f"{head.task.value}; ask {other}",
            source.adapter_param,
            "adapter_has_no_head",
        )
    return head


async def in_turns(items: Iterable[T]) -> list[T]:
    """All of a lazy sequence; other calls have their turns between."""
    made: list[T] = []
    for item in items:
        made.append(item)
        if len(made) % _ITEMS_A_TURN == 0:
            await asyncio.sleep(0)
    return made


def activated(head: HeadPlan, logits: Tensor, use_activation: bool | None) -> Tensor:
    """Probabilities of labels [..., n_labels], or the logits where that is asked for."""
    if use_activation is False or head.activation is Activation.NONE:
        return logits
    return logits.sigmoid() if head.activation is Activation.SIGMOID else logits.softmax(-1)
