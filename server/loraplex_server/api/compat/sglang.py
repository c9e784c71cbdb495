"""SGLang's own routes: /generate with ``text`` or ``input_ids``, and two that load adapters.

TGI has a /generate, too; ``tgi`` has the route and calls ``answer_native`` for SGLang's bodies.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Annotated, NamedTuple, TypeVar

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, BeforeValidator, Field, JsonValue

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import LoadLoraBody, UnloadLoraBody
from loraplex_server.api.protocol.body import Body, Few, JsonObject, Name, TokenId, exactly_one_of
from loraplex_server.api.protocol.completion import CompletionBody, check_prompt
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.generation import MAX_LOGPROBS
from loraplex_server.api.routes import lora_compat
from loraplex_server.api.serving.completion.completion import CompletionSource, split_prompts
from loraplex_server.api.serving.disconnect import unless_client_leaves
from loraplex_server.api.serving.text_generation.answer_head import AnswerHead
from loraplex_server.api.serving.text_generation.choice import ChoiceOutput
from loraplex_server.api.serving.text_generation.generation import Usage
from loraplex_server.api.serving.text_generation.text_call import TextApi, TextCall
from loraplex_server.api.serving.unsupported import Rules, is_set, refuse_unsupported
from loraplex_server.api.state import Access, AppState, State
from loraplex_server.api.validation import validated
from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.errors import invalid
from loraplex_server.text.token_text import TokenTexts

router = APIRouter(route_class=JsonRoute, tags=["Routes of other servers"])
_RESPONSES = errors(404, 412, 415)
Item = TypeVar("Item")
_MAX_NEW_TOKENS = 128  # of SGLang
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "n", "stop", "stop_token_ids", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "ignore_eos"),
    *("skip_special_tokens", "json_schema", "regex", "ebnf"),
)
# field of ``sampling_params`` → field of a completion
_SAMPLING = {
    **{name: name for name in _SAME},
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "sampling_seed": "seed",
}
_NOT_READ = (is_set, "only text and images are read, images in chats")
_REFUSED: Rules = {
    "input_embeds": (is_set, "tensors are not accepted over HTTP"),
    "image_data": (is_set, "send images to /v1/chat/completions"),
    "video_data": _NOT_READ,
    "audio_data": _NOT_READ,
    "token_ids_logprob": (is_set, "send top_logprobs_num for the most likely tokens"),
    "return_hidden_states": (is_set, "hidden states are not answered"),
    "return_routed_experts": (is_set, "see /v1/adapters/NAME/routing"),
    "session_params": (is_set, "send the whole prompt; its prefix is cached"),
    "custom_logit_processor": (is_set, "code of a request is never run"),
    "custom_params": (is_set, "code of a request is never run"),
    "structural_tag": (is_set, "use json_schema, regex or ebnf"),
    "stop_regex": (is_set, "use stop or regex"),
}


class NativeBody(Body):
    """The body has one prompt, or a list of prompts with an adapter for each."""

    model_config = exactly_one_of(text=["string", "array"], input_ids="array")

    text: (
        Annotated[
            str | Annotated[Few[str], Field(min_length=1)],
            BeforeValidator(check_prompt),
        ]
        | None
    ) = None
    input_ids: (
        Annotated[
            Annotated[Few[TokenId], Field(min_length=1)]
            | Annotated[Few[Few[TokenId]], Field(min_length=1)],
            BeforeValidator(check_prompt),
        ]
        | None
    ) = None
    sampling_params: JsonObject | Few[JsonObject] | None = None
    model: Name | None = None
    lora_path: Name | Few[Name | None] | None = None
    return_logprob: bool | None = None
    logprob_start_len: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None  # −1: the answer's
    top_logprobs_num: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None

    @property
    def first_shown(self) -> int | None:
        """The first token of the prompt whose log-probability is answered."""
        start = self.logprob_start_len
        return None if start is None or start < 0 else start


class NativeAnswer(BaseModel):
    text: str
    output_ids: list[int]
    meta_info: dict[str, JsonValue]


class AdapterUpdate(BaseModel):
    """``loaded_adapters`` has the adapter of the request, and no others of the server."""

    success: bool
    error_message: str
    loaded_adapters: dict[str, str]  # name → ``lora_path``


@router.post("/load_lora_adapter", response_model=AdapterUpdate, responses=_RESPONSES)
async def load_lora_adapter(body: LoadLoraBody, access: Access, state: State) -> Response:
    await lora_compat.load_lora_adapter(body, access, state)
    return _updated({body.lora_name: body.lora_path})


@router.post("/unload_lora_adapter", response_model=AdapterUpdate, responses=_RESPONSES)
async def unload_lora_adapter(body: UnloadLoraBody, access: Access, state: State) -> Response:
    await lora_compat.unload_lora_adapter(body, access, state)
    return _updated({})


def _updated(loaded: Mapping[str, str]) -> Response:
    return ORJSONResponse({"success": True, "error_message": "", "loaded_adapters": loaded})


async def answer_native(state: AppState, request: Request, body: NativeBody) -> Response:
    """Answer each prompt by a completion of its own. Raises ApiError."""
    unknown = body.model_extra or {}
    refuse_unsupported(unknown, _REFUSED, adapter_field="lora_path")
    state.unknown_fields.warn(unknown)
    param = "text" if body.input_ids is None else "input_ids"
    completions = list(_completions(body))
    answers: list[_Answer] = []
    for completion in completions:
        api = TextApi("gen-", param, "sampling_params.max_new_tokens")
        call = TextCall(state, request, completion, api, n_prompts=len(completions))
        texts, id_lists = split_prompts(completion.prompt)
        for ids in id_lists:
            state.text.check_ids(ids, param)
        new_format = partial(_NativeFormat, body, state.text.token_texts, perf_counter())
        source = CompletionSource(call, texts, id_lists, completion.n or 1, new_format)
        answers.append(_Answer(call, source))
    if body.stream:
        return await answers[0].call.respond(answers[0].source)
    written = await unless_client_leaves(_all_of(answers), request.receive)
    is_list = isinstance(_prompts(body), list) or any((each.n or 1) > 1 for each in completions)
    return ORJSONResponse(b"[%s]" % written if is_list else written)


class _Answer(NamedTuple):
    call: TextCall[CompletionBody]
    source: CompletionSource


async def _all_of(answers: Sequence[_Answer]) -> bytes:
    """Join the answers of all calls. The first error cancels the other calls, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each.call.answer(each.source)) for each in answers]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return b",".join([task.result() for task in tasks])


def _prompts(body: NativeBody) -> list[str] | list[list[int]] | str | tuple[int, ...]:
    """Return the prompt, or the list of prompts. Raises ApiError."""
    if (body.text is None) == (body.input_ids is None):
        raise invalid("give either text or input_ids", "text")
    if body.text is not None:
        return body.text
    assert body.input_ids is not None
    many = [item for item in body.input_ids if isinstance(item, list)]
    return many or tuple(item for item in body.input_ids if isinstance(item, int))


def _completions(body: NativeBody) -> Iterator[CompletionBody]:
    """Yield the completion of each prompt. Raises ApiError."""
    given = _prompts(body)
    prompts: Sequence[object] = given if isinstance(given, list) else [given]
    if body.stream and len(prompts) > 1:
        raise invalid("a stream answers one prompt; send each prompt in a call", "stream")
    shows_prompt = bool(body.return_logprob) and body.first_shown is not None
    if body.stream and shows_prompt:
        raise invalid("log-probabilities of the prompt are not streamed", "logprob_start_len")
    n_top = body.top_logprobs_num or 0
    paths = _one_each("lora_path", body.lora_path, len(prompts))
    params = _one_each("sampling_params", body.sampling_params, len(prompts))
    for prompt, path, sampling in zip(prompts, paths, params, strict=True):
        yield validated(
            CompletionBody,
            {
                **_sampling_fields(sampling or {}),
                "prompt": list(prompt) if isinstance(prompt, tuple) else prompt,
                "model": body.model,
                "lora_path": path,
                "logprobs": n_top if body.return_logprob else None,
                "prompt_logprobs": n_top if shows_prompt else None,
                "return_token_ids": True,
                "stream": body.stream,
            },
        )


def _one_each(
    name: str, values: Item | list[Item] | list[Item | None] | None, n: int
) -> Sequence[Item | None]:
    """Return a value for each of ``n`` prompts. Raises ApiError."""
    if not isinstance(values, list):
        return [values] * n
    if len(values) != n:
        raise invalid(f"{name} has {len(values)} items for {n} prompts; give as many", name)
    return values


def _sampling_fields(sampling: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of a completion. Raises ApiError for what changes answers unread."""
    unknown = {name: value for name, value in sampling.items() if name not in _SAMPLING}
    refuse_unsupported(unknown, _REFUSED, adapter_field="lora_path")
    read = {_SAMPLING[name]: sampling[name] for name in sampling.keys() & _SAMPLING.keys()}
    return {"max_tokens": _MAX_NEW_TOKENS} | {k: v for k, v in read.items() if v is not None}


class _NativeFormat:
    """Writes the answers to one prompt. Each event has the whole answer so far, as in SGLang."""

    def __init__(
        self, body: NativeBody, texts: TokenTexts, started: float, head: AnswerHead
    ) -> None:
        """``started``: by perf_counter."""
        self._body, self._texts = body, texts
        self._started, self._head = started, head
        self._so_far: dict[int, ChoiceOutput] = {}  # by index of the choice

    def chunks(self, output: ChoiceOutput, usage: Usage) -> bytes:
        if not (output.text or output.token_ids or output.finish_reason):
            return b""
        so_far = self._so_far.setdefault(output.index, ChoiceOutput(output.index))
        so_far.add(output)
        event = {**self._shown(so_far, usage), "index": output.index}
        return b"data: " + orjson.dumps(event) + b"\n\n"

    def usage_chunk(self, usage: Usage) -> bytes:
        return b""  # every event has the usage

    def body(self, choices: Sequence[ChoiceOutput], usage: Usage) -> bytes:
        """Return JSON objects with commas between them."""
        return b",".join([orjson.dumps(self._shown(choice, usage)) for choice in choices])

    def _shown(self, choice: ChoiceOutput, usage: Usage) -> dict[str, object]:
        meta: dict[str, object] = {
            "id": self._head.id,
            "finish_reason": _finish_reason(choice),
            "prompt_tokens": usage.n_prompt,
            "completion_tokens": len(choice.token_ids),
            "cached_tokens": usage.n_cached,
            "e2e_latency": perf_counter() - self._started,
        }
        if self._body.return_logprob:
            meta |= self._logprobs(choice)
        return {"text": choice.text, "output_ids": choice.token_ids, "meta_info": meta}

    def _logprobs(self, choice: ChoiceOutput) -> dict[str, object]:
        body, first = self._body, self._body.first_shown
        of_output = [entry.logprobs for entry in choice.entries]
        of_prompt = [] if first is None else choice.prompt_logprobs[first:]
        shown: dict[str, object] = {
            "output_token_logprobs": [self._entry(t.token_id, t.logprob) for t in of_output],
            "input_token_logprobs": [
                self._entry(token_id, None if t is None else t.logprob)
                for token_id, t in zip(self._head.prompt_ids[0][first:], of_prompt, strict=True)
            ]
            if of_prompt
            else [],
        }
        if body.top_logprobs_num:
            shown["output_top_logprobs"] = [self._top(each) for each in of_output]
            shown["input_top_logprobs"] = [each and self._top(each) for each in of_prompt]
        return shown

    def _top(self, token: TokenLogprobs) -> list[list[object]]:
        n_top = self._body.top_logprobs_num
        return [self._entry(token_id, logprob) for token_id, logprob in token.top[:n_top]]

    def _entry(self, token_id: int, logprob: float | None) -> list[object]:
        text = self._texts.get(token_id).text if self._body.return_text_in_logprobs else None
        return [None if logprob is None else max(logprob, -9999.0), token_id, text]


def _finish_reason(choice: ChoiceOutput) -> dict[str, object] | None:
    if choice.finish_reason is None:
        return None
    if choice.finish_reason == "length":
        return {"type": "length", "length": len(choice.token_ids)}
    matched = choice.stop_reason
    if matched is None and choice.token_ids:
        matched = choice.token_ids[-1]  # the end token
    return {"type": "stop", "matched": matched}
