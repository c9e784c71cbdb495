"""The common part of all calls for vectors, classes and scores: checks, source, prompts."""

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Iterable, Mapping
from time import perf_counter
from typing import TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from loraplex_adapter_store.names.selector import Auto, Description
from loraplex_adapter_store.plan import Activation, HeadPlan, HeadTask
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.vectors import InputBody, VectorBody
from loraplex_server.api.serving.chat.chat_prompt import ChatPrompt
from loraplex_server.api.serving.completion.completion import split_prompts
from loraplex_server.api.serving.disconnect import unless_client_leaves
from loraplex_server.api.serving.unsupported import refuse_unsupported
from loraplex_server.api.state import AppState
from loraplex_server.errors import invalid

from .vector_source import AdapterVectors, Cut, EncoderVectors, Ids, VectorSource

T = TypeVar("T")
Answer = Callable[[VectorSource], Coroutine[None, None, bytes]]
_ITEMS_A_TURN = 32  # items between two yields to the event loop


class VectorCall:
    """A call for vectors. The constructor checks what needs neither adapter nor tokens."""

    def __init__(
        self,
        state: AppState,
        request: Request,
        body: VectorBody,
        id_prefix: str,
        prompt_param: str,
        *,
        n_inputs: int,
        needs_head: bool = False,
    ) -> None:
        """``prompt_param``: the field with the texts. ``needs_head``: only classifiers can answer.

        Raises ApiError.
        """
        self.info, _ = state.begin_call(request)
        refuse_unsupported(body.model_extra or {})
        state.unknown_fields.warn(body.model_extra or ())
        state.lifecycle.check_admitting()
        self.state = state
        self.request = request
        if self.info.meter is not None:
            self.info.meter.check_tokens()
        limit = state.config.http.max_inputs
        if n_inputs > limit:
            raise invalid(f"{n_inputs} texts are more than the {limit} of one call", prompt_param)
        self.cut = Cut(body.truncate_prompt_tokens, body.truncation_side)
        self.id = f"{id_prefix}-{uuid.uuid4().hex}"
        self.prompt_param = prompt_param
        self._body, self._needs_head = body, needs_head

    async def respond(self, routing_text: str, answer: Answer) -> Response:
        """Send the JSON of ``answer``. ``routing_text``: the text for ``auto`` routing.

        A client that leaves stops the work. Raises ApiError.
        """

        async def run() -> bytes:
            source = await self._source(routing_text)
            try:
                return await answer(source)
            finally:
                source.close()

        return ORJSONResponse(await unless_client_leaves(run(), self.request.receive))

    async def _source(self, routing_text: str) -> VectorSource:
        state, body = self.state, self._body
        if state.model.encoder is not None and body.model == state.model.encoder.name:
            if body.adapter is not None or body.adapter_id or body.lora_path:
                raise invalid(
                    f"{body.model} has no adapters; adapters belong to {state.resolver.base_name}",
                    "adapter",
                )
            return EncoderVectors(state, self.info, state.model.encoder)
        started = perf_counter()
        requested = state.resolver.parse(**body.adapter_fields)
        selector = requested.selector
        if self._needs_head and isinstance(selector, Auto | Description):
            finds = "'auto' chooses" if isinstance(selector, Auto) else "a description makes"
            raise invalid(f"{finds} adapters that write text; name a classifier", requested.param)
        resolved = await state.resolver.resolve(requested, routing_text, self.info.access)
        self.info.chose(resolved.header, resolved.chosen_by)
        return AdapterVectors(
            state,
            self.info,
            resolved,
            requested,
            call_id=self.id,
            cache_salt=body.cache_salt,
            load_s=perf_counter() - started,
            prompt_param=self.prompt_param,
        )

    async def write(
        self, source: VectorSource, items: Iterable[Mapping[str, object]], n_tokens: int
    ) -> bytes:
        """Return the answer with ``items`` as its data."""
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
    """The ``input`` or ``messages`` of a body."""

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
                default_generation_prompt=False,
            )

    def __len__(self) -> int:
        return len(self._texts) or len(self._id_lists) or 1

    @property
    def routing_text(self) -> str:
        return "\n".join(self._texts) if self._chat is None else self._chat.routing_text

    async def prompts(self, source: VectorSource, cut: Cut) -> list[Ids]:
        """Return the token ids of each prompt, truncated. Raises ApiError (400)."""
        if self._chat is not None:
            return cut.apply([await source.encode_chat(self._chat)], source, "messages")
        if self._texts:
            special = self._body.add_special_tokens is not False
            return await source.encode(self._texts, param="input", special=special, cut=cut)
        for ids in self._id_lists:
            source.check_ids(ids, "input")
        return cut.apply(self._id_lists, source, "input")


def head_for(source: VectorSource, task: HeadTask, route: str) -> HeadPlan:
    """Return the adapter's head for ``route``. Raises ApiError (400) if the adapter lacks it."""
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
            f"{route} needs a {task.value} head, and {source.label} has a {head.task.value} "
            f"head; use {other}",
            source.adapter_param,
            "adapter_has_no_head",
        )
    return head


async def in_turns(items: Iterable[T]) -> list[T]:
    """Evaluate a lazy sequence, with yields to the event loop."""
    evaluated: list[T] = []
    for item in items:
        evaluated.append(item)
        if len(evaluated) % _ITEMS_A_TURN == 0:
            await asyncio.sleep(0)
    return evaluated


def activated(head: HeadPlan, logits: Tensor, use_activation: bool | None) -> Tensor:
    """Return probabilities of labels [..., n_labels], or logits if the request wants them."""
    if use_activation is False or head.activation is Activation.NONE:
        return logits
    return logits.sigmoid() if head.activation is Activation.SIGMOID else logits.softmax(-1)
