"""Turns the sampling fields of a body into checked parameters for the engine."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from loraplex_server.adapters.resolving.adapter_defaults import AdapterDefaults, read_defaults
from loraplex_server.adapters.resolving.resolved_adapter import ResolvedAdapter
from loraplex_server.api.protocol.generation import GenerationBody
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import invalid
from loraplex_server.text.text_pipeline import TextPipeline

Body = TypeVar("Body", bound=GenerationBody)


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stop strings, which the HTTP side searches in the text. The engine knows stop token ids."""

    strings: tuple[str, ...] = ()
    include_in_output: bool = False
    min_tokens: int = 0  # stop strings within the first ``min_tokens`` tokens are ignored


def max_output_tokens(
    requested: int | None,
    *,
    default: int | None,
    n_prompt: int,
    max_model_len: int,
    param: str,
    prompt_param: str,
) -> int:
    """Return ``requested``, else the card's ``default``, cut to the end of the context.

    Raises ApiError (400) if the prompt, or the requested output, does not fit.
    """
    room = max_model_len - n_prompt
    if room < 1 or (requested is not None and requested > room):
        # OpenAI's and Anthropic's own words: LiteLLM and LangChain search for them.
        problem = f"prompt is too long: {n_prompt} tokens > {max_model_len} maximum"
        if room >= 1:
            problem = (
                f"input length and `{param}` exceed context limit: {n_prompt} + {requested} > "
                f"{max_model_len}"
            )
        raise invalid(
            f"{problem}. This model's maximum context length is {max_model_len} tokens; shorten "
            "the prompt or the output.",
            prompt_param,
            "context_length_exceeded",
        )
    return min(default or room, room) if requested is None else requested


async def sampling_params(
    body: GenerationBody,
    text: TextPipeline,
    *,
    tenant: str,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Return the parameters of all prompts, except ``max_tokens``, which ``limited`` sets.

    ``logprobs`` and ``prompt_logprobs``: the number of most likely tokens at each token, or None.
    Raises ApiError (400) with the field.
    """
    stop_ids = body.stop_token_ids or []
    text.check_ids(stop_ids, "stop_token_ids")
    bad_words = await _bad_words(body.bad_words or [], text, tenant)
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
    """Set ``max_tokens`` for one prompt. Raises ApiError (400)."""
    if sampling.min_tokens > max_tokens:
        raise invalid(
            f"min_tokens is {sampling.min_tokens}, but at most {max_tokens} tokens may be "
            "generated",
            "min_tokens",
        )
    return replace(sampling, max_tokens=max_tokens)


def with_defaults(body: Body, defaults: AdapterDefaults) -> Body:
    """Fill null fields from the adapter's card. ``logit_bias`` is merged token by token.

    ``max_output_tokens`` applies the default of ``max_tokens``, once the prompt's length is known.
    """
    fields = defaults.sampling.model_dump(exclude_none=True, exclude={"max_tokens"})
    if defaults.stop is not None:
        fields["stop"] = defaults.stop
    fields = {name: value for name, value in fields.items() if getattr(body, name) is None}
    if defaults.logit_bias:
        fields["logit_bias"] = {**defaults.logit_bias, **(body.logit_bias or {})}
    return body.model_copy(update=fields)


def defaults_of(resolved: ResolvedAdapter) -> AdapterDefaults:
    """Return the defaults of requests from the adapter's card; empty for the base."""
    lease = resolved.lease
    return read_defaults(lease.defaults) if lease and lease.defaults else AdapterDefaults()


def seed_of_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """Keep the seed for choice 0. Derive the seeds of others from the seed and the index alone."""
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


async def _bad_words(
    words: Sequence[str], text: TextPipeline, tenant: str
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of each word, at the start of a text and after a space, as vLLM does."""
    if not words:
        return ()
    both = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
    encoded = await text.encode_many(
        both, add_special_tokens=False, param="bad_words", tenant=tenant
    )
    words_ids = []
    for bare, spaced in zip(encoded[::2], encoded[1::2], strict=True):
        if not bare:
            raise invalid("a bad word must have a token", "bad_words")
        words_ids.append(bare)
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            words_ids.append(spaced)
    return tuple(words_ids)


def _allowed_token_ids(body: GenerationBody, text: TextPipeline) -> frozenset[int] | None:
    if body.allowed_token_ids is None:
        return None
    text.check_ids(body.allowed_token_ids, "allowed_token_ids")
    return frozenset(body.allowed_token_ids)


def _check_something_is_left(
    allowed: frozenset[int] | None, bad_words: Sequence[tuple[int, ...]], vocab_size: int
) -> None:
    """Raises ApiError (400) if no token is left. The engine checks words of several tokens."""
    banned = {word[0] for word in bad_words if len(word) == 1}
    if allowed is not None and allowed <= banned:
        raise invalid("bad_words forbid all of allowed_token_ids; allow other tokens", "bad_words")
    if len(banned) >= vocab_size:
        raise invalid("bad_words forbid every token; leave some out", "bad_words")


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
