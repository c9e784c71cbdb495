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
from loraplex_server.api.protocol.vectors import VectorBody
from loraplex_server.api.serving.disconnect import unless_client_leaves
from loraplex_server.api.serving.unsupported import refuse_unsupported
from loraplex_server.api.state import AppState
from loraplex_server.errors import from_image, invalid
from loraplex_server.images import ImageRefused, check_count

from .vector_source import AdapterVectors, Cut, EncoderVectors, VectorSource

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
        n_images: int = 0,
        needs_head: bool = False,
    ) -> None:
        """``prompt_param``: the field with the texts or images. ``n_images``: of the inputs.

        ``needs_head``: only classifiers can answer. Raises ApiError.
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
        try:
            check_count(n_images, state.config.http.image_limits)
        except ImageRefused as error:
            raise from_image(error, prompt_param) from error
        self.cut = Cut(body.truncate_prompt_tokens, body.truncation_side)
        self.id = f"{id_prefix}-{uuid.uuid4().hex}"
        self.prompt_param = prompt_param
        self._body, self._needs_head, self._has_images = body, needs_head, n_images > 0

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
        if self._has_images and isinstance(selector, Auto):
            raise invalid("'auto' chooses adapters by texts; name one", requested.param)
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
