"""The sampling fields of a body, checked and turned into what the engine trusts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from loraplex_server.adapters.adapter_defaults import AdapterDefaults
from loraplex_server.api.errors import invalid
from loraplex_server.api.protocol.generation import GenerationBody
from loraplex_server.engine.sampling_params import SamplingParams

from .text_pipeline import TextPipeline

__all__ = [
    "StopRule",
    "limited",
    "max_output_tokens",
    "sampling_params",
    "seed_of_choice",
    "stop_rule",
    "with_defaults",
]


Body = TypeVar("Body", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stop strings, searched in the text by the HTTP side; stop ids are the engine's."""

    strings: tuple[str, ...] = ()
    include_in_output: bool = False
    min_tokens: int = 0  # strings inside the first so many tokens do not count


def max_output_tokens(
    asked: int | None,
    *,
    default: int | None,
    n_prompt: int,
    max_model_len: int,
    param: str,
    prompt_param: str,
) -> int:
    """Where nothing was asked: the card's ``default``, at most up to the end of the context.

    Raises ApiError (400) if the prompt, or what was asked, cannot fit.
    """
    room = max_model_len - n_prompt
    if room < 1 or (asked is not None and asked > room):
        wanted = "" if asked is None else f" and {asked} tokens of output were asked for ({param})"
        raise invalid(
            f"this model's context is {max_model_len} tokens long; the prompt has {n_prompt}"
            f"{wanted}. Shorten the prompt or the output.",
            prompt_param,
            "context_length_exceeded",
        )
    return min(default or room, room) if asked is None else asked


async def sampling_params(
    body: GenerationBody,
    text: TextPipeline,
    *,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """For all prompts of a call; ``limited`` sets the rest. Raises ApiError (400) with the field.

    ``prompt_logprobs``: how many most likely tokens are needed at each, if any.
    """
    stop_ids = body.stop_token_ids or []
    text.check_ids(stop_ids, "stop_token_ids")
    bad_words = await _bad_words(body.bad_words or [], text)
    allowed = _allowed_token_ids(body, text)
    _check_something_is_left(allowed, bad_words, text.vocab_size)
    return SamplingParams(
        max_tokens=0,
        min_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(body.top_k or 0, 0),
        min_p=_or(body.min_p, 0.0),
        seed=body.seed,
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        logit_bias=_logit_bias(body.logit_bias or {}, text),
        bad_words=bad_words,
        allowed_token_ids=allowed,
        stop_token_ids=frozenset(stop_ids),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def limited(sampling: SamplingParams, max_tokens: int) -> SamplingParams:
    """For one prompt. Raises ApiError (400)."""
    if sampling.min_tokens > max_tokens:
        raise invalid(
            f"min_tokens is {sampling.min_tokens}, more than the {max_tokens} that may be "
            "generated",
            "min_tokens",
        )
    return replace(sampling, max_tokens=max_tokens)


def with_defaults(body: Body, defaults: AdapterDefaults) -> Body:
    """The request's own fields win; a bias is taken token by token.

    Not ``max_tokens``: how much fits is not known yet, see ``max_output_tokens``.
    """
    found = defaults.sampling.model_dump(exclude_none=True, exclude={"max_tokens"})
    if defaults.stop is not None:
        found["stop"] = defaults.stop
    found = {name: value for name, value in found.items() if getattr(body, name) is None}
    if defaults.logit_bias:
        found["logit_bias"] = {**defaults.logit_bias, **(body.logit_bias or {})}
    return body.model_copy(update=found)


def seed_of_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """Choice 0 keeps the seed; the others get seeds that depend on nothing but seed and index."""
    if sampling.seed is None or index == 0:
        return sampling
    digest = hashlib.sha256(f"{sampling.seed}/{index}".encode()).digest()
    return replace(sampling, seed=int.from_bytes(digest[:8], "little") >> 1)


def stop_rule(body: GenerationBody) -> StopRule:
    strings = [body.stop] if isinstance(body.stop, str) else (body.stop or [])
    return StopRule(tuple(strings), bool(body.include_stop_str_in_output), body.min_tokens or 0)


def _logit_bias(bias: Mapping[str, float], text: TextPipeline) -> dict[int, float]:
    parsed = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise invalid(f"logit_bias key {key[:40]!r} is not a token id", "logit_bias")
        parsed[int(key)] = value
    text.check_ids(list(parsed), "logit_bias")
    return parsed


async def _bad_words(words: Sequence[str], text: TextPipeline) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word at the start of a text and, as vLLM, of the same after a space."""
    if not words:
        return ()
    both = [form for word in words for form in (word.lstrip(), f" {word.lstrip()}")]
    encoded = await text.encode_many(both, add_special_tokens=False, param="bad_words")
    found = []
    for bare, spaced in zip(encoded[::2], encoded[1::2], strict=True):
        if not bare:
            raise invalid("a bad word must have a token", "bad_words")
        found.append(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            found.append(spaced)
    return tuple(found)


def _allowed_token_ids(body: GenerationBody, text: TextPipeline) -> frozenset[int] | None:
    if body.allowed_token_ids is None:
        return None
    text.check_ids(body.allowed_token_ids, "allowed_token_ids")
    return frozenset(body.allowed_token_ids)


def _check_something_is_left(
    allowed: frozenset[int] | None, bad_words: Sequence[tuple[int, ...]], vocab_size: int
) -> None:
    """Words of several tokens forbid one only here and there: the engine sees those."""
    banned = {word[0] for word in bad_words if len(word) == 1}
    if allowed is not None and allowed <= banned:
        raise invalid(
            "bad_words forbid every one of allowed_token_ids; allow other tokens", "bad_words"
        )
    if len(banned) >= vocab_size:
        raise invalid("bad_words forbid every token; leave some out", "bad_words")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
