"""Samples for Tinker's sampling clients: through the engine, with the client's adapter."""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from time import perf_counter

from loraplex_server.adapters.resolving.resolved_adapter import AdapterRequest, ResolvedAdapter
from loraplex_server.adapters.tinker.sessions import Sampler
from loraplex_server.api.request_info import RequestInfo
from loraplex_server.api.serving.text_generation.choice import ChoiceOutput, ChoiceRequest
from loraplex_server.api.serving.text_generation.engine_call import CallContext
from loraplex_server.api.serving.text_generation.generation import Generation
from loraplex_server.api.serving.text_generation.sampling import (
    StopRule,
    max_output_tokens,
    seed_of_choice,
)
from loraplex_server.api.state import AppState
from loraplex_server.call_log import CallRecord
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import ApiError, invalid
from loraplex_server.metrics.server_metrics import CallMetrics

from .tinker_messages import SampledSequence, sample_response
from .tinker_protocol import SampleBody

_PATH = "/api/v1/asample"  # in the log of calls
_UNSUPPORTED = ("target_prompt_logprobs", "prompt_alt_tokens_k", "record_stability_info")
_MAX_PROMPT_LOGPROBS = 1 << 17  # of one call


def check_sample(state: AppState, info: RequestInfo, body: SampleBody) -> tuple[int, ...]:
    """Return the prompt's ids. Raises ApiError (400) for what no adapter could answer."""
    for name in _UNSUPPORTED:
        if getattr(body, name):
            raise invalid(f"{name} is not supported", name, "unsupported_parameter")
    ids = tuple(token for chunk in body.prompt.chunks for token in chunk.tokens)
    state.text.check_ids(ids, "prompt")
    limit = min(state.config.http.max_choices, info.share.max_queued or 1 << 30)
    if body.num_samples > limit:
        raise invalid(f"num_samples is {body.num_samples}, at most {limit} are made", "num_samples")
    if len(ids) * (body.topk_prompt_logprobs + 1) > _MAX_PROMPT_LOGPROBS:
        raise invalid(
            f"topk_prompt_logprobs × tokens of the prompt may be {_MAX_PROMPT_LOGPROBS:,}",
            "topk_prompt_logprobs",
        )
    return ids


async def start_sampling(
    state: AppState,
    info: RequestInfo,
    call_id: str,
    sampler: Sampler,
    body: SampleBody,
    ids: tuple[int, ...],
) -> Callable[[], Coroutine[None, None, bytes]]:
    """Submit the samples, and return a function that waits for them. Raises ApiError.

    A full queue is a 429 here, after which clients try again.
    """
    record = CallRecord(call_id, _PATH, info.tenant)
    state.metrics.calls.begin(record)
    started = perf_counter()

    def end(status: int) -> None:
        state.metrics.calls.end(record, seconds=perf_counter() - started, status=status)

    try:
        ref = sampler.adapter
        request = AdapterRequest(ref, "model_path", str(ref or state.resolver.base_name))
        resolved = await state.resolver.resolve(request, access=info.access)
        record.adapter, record.chosen_by = resolved.header, resolved.chosen_by
        load_s = perf_counter() - started
        generation = _generation(state, info, record, resolved, load_s, body, ids)
        await generation.start()
    except ApiError as error:
        record.error = error.code
        end(error.status)
        raise

    async def collect() -> bytes:
        status = 499  # cancelled
        try:
            choices = await generation.collect()
            status = 200
            return _answer(body, choices, generation.usage.n_cached)
        except ApiError as error:
            record.error, status = error.code, error.status
            raise
        finally:
            generation.close()
            end(status)

    return collect


def _generation(
    state: AppState,
    info: RequestInfo,
    record: CallRecord,
    resolved: ResolvedAdapter,
    load_s: float,
    body: SampleBody,
    ids: tuple[int, ...],
) -> Generation:
    """Takes over ``resolved``."""
    try:
        resolved.check_generates("model_path")
        sampling, stop = _sampling(state, body, len(ids))
        choices = []
        for index in range(body.num_samples):
            of_choice = seed_of_choice(sampling, index)
            if index > 0:
                of_choice = replace(of_choice, prompt_logprobs=None)
            request = GenerationRequest(
                request_id=f"{record.id}-{index}",
                prompt_ids=ids,
                sampling=of_choice,
                adapter=resolved.lease,
                cache_salt=info.tenant,
                share=info.share,
            )
            choices.append(ChoiceRequest(request, stop, skip_special_tokens=False))
    except BaseException:
        resolved.release()
        raise
    metrics = CallMetrics(
        state.metrics,
        record,
        adapter=resolved.metrics_label,
        load_s=load_s,
        n=body.num_samples,
        max_tokens=sampling.max_tokens,
        n_prompt=len(ids),
    )
    context = CallContext(state.engine, state.live, resolved, info.meter, metrics, "prompt")
    return Generation(context, state.text.backend, choices, n_prompt_tokens=len(ids))


def _sampling(state: AppState, body: SampleBody, n_prompt: int) -> tuple[SamplingParams, StopRule]:
    params = body.sampling_params
    stop = [params.stop] if isinstance(params.stop, str) else params.stop or []
    max_tokens = max_output_tokens(
        params.max_tokens,
        default=None,
        n_prompt=n_prompt,
        max_model_len=state.engine.max_model_len,
        param="max_tokens",
        prompt_param="prompt",
    )
    sampling = SamplingParams(
        max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        seed=params.seed,
        stop_token_ids=frozenset(each for each in stop if isinstance(each, int)),
        ignore_eos=params.stop == [],
        logprobs=body.topk_sample_logprobs,
        prompt_logprobs=body.topk_prompt_logprobs if _wants_prompt(body) else None,
    )
    return sampling, StopRule(tuple(each for each in stop if isinstance(each, str)))


def _answer(body: SampleBody, choices: list[ChoiceOutput], n_cached: int) -> bytes:
    sequences = [
        SampledSequence(
            choice.token_ids,
            [entry.logprobs for entry in choice.entries],
            choice.finish_reason == "length",
        )
        for choice in choices
    ]
    prompt = list(choices[0].prompt_logprobs) if _wants_prompt(body) else None
    if prompt is not None and (n := body.prompt_logprobs_last_n) is not None:
        prompt[:-n] = [None] * len(prompt[:-n])
    return sample_response(
        sequences,
        prompt,
        n_top=body.topk_sample_logprobs,
        n_top_of_prompt=body.topk_prompt_logprobs,
        n_cached=n_cached,
    )


def _wants_prompt(body: SampleBody) -> bool:
    return bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
