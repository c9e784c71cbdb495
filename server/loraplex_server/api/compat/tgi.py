"""The routes of TGI and LoRAX, as lorax-client and huggingface_hub's `text_generation` call them.

POST / answers a list, as both servers do; /generate an object; /generate_stream always streams.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Discriminator, Field, Tag

from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.body import INT64_END, Body, Name
from loraplex_server.api.protocol.completion import CompletionBody
from loraplex_server.api.protocol.errors import errors, with_events
from loraplex_server.api.protocol.generation import ResponseFormat, StopStrings
from loraplex_server.api.serving.completion.completion import CompletionSource
from loraplex_server.api.serving.text_generation.choice import ChoiceOutput, TokenEntry
from loraplex_server.api.serving.text_generation.generation import Usage
from loraplex_server.api.serving.text_generation.text_call import TextApi, TextCall
from loraplex_server.api.serving.unsupported import Rules, is_set, refuse_unsupported
from loraplex_server.api.state import AppState, State
from loraplex_server.api.streaming.sse import OPENAI_SSE
from loraplex_server.errors import invalid
from loraplex_server.text.token_text import TokenTexts

from .sglang import NativeAnswer, NativeBody, answer_native

router = APIRouter(route_class=JsonRoute, tags=["Routes of other servers"])
_RESPONSES = errors(404, 415, 499)
_API = TextApi("gen-", "inputs", "max_new_tokens", sse=OPENAI_SSE._replace(end=b""))
_MAX_NEW_TOKENS = 100  # of TGI
_OF_SGLANG = frozenset({"text", "input_ids"})
_ADAPTER = "parameters.adapter_id"
_REFUSED: Rules = {
    "model": (is_set, f"name the adapter in '{_ADAPTER}'"),
    "merged_adapters": (is_set, "send the mixture as `adapter` to /v1/completions"),
    "best_of": (lambda value: value not in (None, 1), "send best_of to /v1/completions"),
    "decoder_input_details": (is_set, "send prompt_logprobs to /v1/completions"),
    "top_n_tokens": (is_set, "send logprobs to /v1/completions"),
    "return_k_alternatives": (is_set, "send logprobs to /v1/completions"),
    "truncate": (is_set, "prompts are not truncated; shorten the prompt"),
    "typical_p": (lambda value: value not in (None, 1), "use top_p"),
    "watermark": (is_set, "answers are not marked"),
}


class GenerateParameters(Body):
    """Greedy unless ``do_sample``, ``temperature``, ``top_k`` or ``top_p`` asks for sampling."""

    adapter_id: Name | None = None
    max_new_tokens: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=INT64_END)] | None = None
    stop: StopStrings | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    grammar: ResponseFormat | None = None  # of TGI
    response_format: ResponseFormat | None = None  # of LoRAX


class GenerateBody(Body):
    inputs: Annotated[str, Field(min_length=1)]
    parameters: GenerateParameters | None = None
    stream: bool | None = None  # of POST /


class GeneratedToken(BaseModel):
    id: int
    text: str
    logprob: float
    special: bool


class GenerateDetails(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[GeneratedToken]  # always empty
    tokens: list[GeneratedToken]


class GenerateAnswer(BaseModel):
    generated_text: str
    details: GenerateDetails | None = None  # absent unless requested


class ServerInfo(BaseModel):
    model_id: str
    max_total_tokens: int


@router.post("/", include_in_schema=False)  # the schema has no GET / either, which is the console
async def generate_or_stream(body: GenerateBody, request: Request, state: State) -> Response:
    return await _answer(state, request, body, stream=bool(body.stream), as_list=True)


def _kind_of(body: object) -> str:
    """Return the tag of a body of /generate: ``inputs`` is of TGI."""
    of_sglang = isinstance(body, dict) and "inputs" not in body and body.keys() & _OF_SGLANG
    return "SGLang" if of_sglang or isinstance(body, NativeBody) else "TGI"


_EitherBody = Annotated[
    Annotated[GenerateBody, Tag("TGI")] | Annotated[NativeBody, Tag("SGLang")],
    Discriminator(_kind_of),
]


@router.post(
    "/generate",
    response_model=GenerateAnswer | NativeAnswer | list[NativeAnswer],
    responses=_RESPONSES,
)
async def generate(body: _EitherBody, request: Request, state: State) -> Response:
    if isinstance(body, NativeBody):
        return await answer_native(state, request, body)
    return await _answer(state, request, body, stream=False)


@router.post("/generate_stream", response_class=Response, responses=with_events(_RESPONSES))
async def generate_stream(body: GenerateBody, request: Request, state: State) -> Response:
    return await _answer(state, request, body, stream=True)


@router.get("/info", response_model=ServerInfo, responses=errors())
async def info(state: State) -> Response:
    name = state.resolver.base_name
    return ORJSONResponse({"model_id": name, "max_total_tokens": state.engine.max_model_len})


async def _answer(
    state: AppState, request: Request, body: GenerateBody, *, stream: bool, as_list: bool = False
) -> Response:
    """Answer by a completion. Raises ApiError."""
    asked = body.parameters or GenerateParameters()
    unknown = {**(body.model_extra or {}), **(asked.model_extra or {})}
    refuse_unsupported(unknown, _REFUSED, adapter_field=_ADAPTER)
    call = TextCall(state, request, _completion(body.inputs, asked, stream=stream), _API)
    state.unknown_fields.warn(unknown)
    special = frozenset(state.model.tokenizer.all_special_ids)
    form = _AnswerForm(body.inputs, asked, special, as_list, state.text.token_texts)
    source = CompletionSource(call, [body.inputs], [], 1, lambda _: _GenerateFormat(form))
    return await call.respond(source)


def _completion(inputs: str, asked: GenerateParameters, *, stream: bool) -> CompletionBody:
    if asked.grammar is not None and asked.response_format is not None:
        raise invalid("grammar and response_format exclude each other; give one", "grammar")
    form = asked.grammar or asked.response_format
    # temperature 0 is greedy, as here
    samples = asked.do_sample or any((asked.temperature, asked.top_k, asked.top_p))
    temperature = 1.0 if asked.temperature is None else asked.temperature
    return CompletionBody.model_validate(
        {
            "prompt": inputs,
            "adapter_id": asked.adapter_id,
            "max_tokens": asked.max_new_tokens or _MAX_NEW_TOKENS,
            "temperature": temperature if samples else 0.0,
            "top_k": asked.top_k,
            "top_p": asked.top_p,
            "repetition_penalty": asked.repetition_penalty,
            "frequency_penalty": asked.frequency_penalty,
            "seed": asked.seed,
            "stop": asked.stop or None,
            "ignore_eos": asked.ignore_eos_token,
            "response_format": form and form.model_dump(by_alias=True, exclude_none=True),
            "logprobs": 0,
            "stream": stream,
        }
    )


@dataclass(frozen=True, slots=True)
class _AnswerForm:
    """What the form of an answer depends on."""

    inputs: str
    asked: GenerateParameters
    special: Collection[int]
    as_list: bool
    token_texts: TokenTexts


class _GenerateFormat:
    """Writes one answer: a token an event, and the whole text with the last one."""

    def __init__(self, form: _AnswerForm) -> None:
        self._form, self._texts = form, form.token_texts
        self._text = form.inputs if form.asked.return_full_text else ""
        self._waiting = ""  # text without a token of its own yet
        self._n_sent = 0

    def chunks(self, output: ChoiceOutput, usage: Usage) -> bytes:
        self._text += output.text
        self._waiting += output.text
        tokens = [self._token(entry, "") for entry in output.entries]
        if output.finish_reason is not None and not tokens:  # a grammar ended without a token
            tokens = [{"id": 0, "text": "", "logprob": 0.0, "special": True}]
        if tokens and self._waiting:
            tokens[0] |= {"text": self._waiting, "special": False}
            self._waiting = ""
        events = []
        for number, token in enumerate(tokens, start=1):
            self._n_sent += 1
            ends = output.finish_reason is not None and number == len(tokens)
            event = {
                "index": self._n_sent,
                "token": token,
                "generated_text": self._text if ends else None,
                "details": self._details(output, usage) if ends else None,
            }
            events.append(b"data:" + orjson.dumps(event) + b"\n\n")
        return b"".join(events)

    def usage_chunk(self, usage: Usage) -> bytes:
        return b""  # the last event has the details

    def body(self, choices: Sequence[ChoiceOutput], usage: Usage) -> bytes:
        (choice,) = choices
        answer: dict[str, object] = {"generated_text": self._text + choice.text}
        if self._form.asked.details:
            tokens = [
                self._token(entry, self._texts.get(entry.logprobs.token_id).text)
                for entry in choice.entries
            ]
            answer["details"] = {
                **self._details(choice, usage),
                "prefill": [],
                "tokens": tokens,
            }
        return orjson.dumps([answer] if self._form.as_list else answer)

    def _token(self, entry: TokenEntry, text: str) -> dict[str, object]:
        token_id = entry.logprobs.token_id
        return {
            "id": token_id,
            "text": text,
            "logprob": max(entry.logprobs.logprob, -9999.0),  # JSON has no −inf
            "special": token_id in self._form.special,
        }

    def _details(self, output: ChoiceOutput, usage: Usage) -> dict[str, object]:
        reason = "length"
        if output.finish_reason == "stop":
            reason = "stop_sequence" if isinstance(output.stop_reason, str) else "eos_token"
        return {
            "finish_reason": reason,
            "prompt_tokens": usage.n_prompt,
            "generated_tokens": usage.n_output,
            "seed": self._form.asked.seed,
        }
