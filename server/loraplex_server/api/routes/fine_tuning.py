"""/v1/fine_tuning/jobs: OpenAI's API to fine-tune the base on uploaded examples."""

import random
import re
import time
import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from loraplex_server.adapters.fine_tuning.training_lines import Method
from loraplex_server.api.adapter_path import new_name
from loraplex_server.api.adapter_shape import requested_shape
from loraplex_server.api.fine_tuning.records import Hyperparameters, TuningJob, TuningStatus
from loraplex_server.api.fine_tuning.runner import FineTuning
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.protocol.fine_tuning import (
    FineTuningJob,
    TuningBody,
    TuningCheckpoint,
    TuningEvent,
)
from loraplex_server.api.request_info import BatchCaller, info_of
from loraplex_server.api.state import Access, AppState, State, Tenant
from loraplex_server.errors import invalid, not_found

from .files import After, Page, page_of

router = APIRouter(route_class=JsonRoute, prefix="/v1/fine_tuning/jobs", tags=["Training"])

Limit = Annotated[int, Query(ge=1, le=100)]
_MAX_BASE = 30  # characters of the base in the name of a result
_METADATA = re.compile(r"metadata\[(.+)\]")


class JobList(Page):
    data: list[FineTuningJob]


class EventList(Page):
    data: list[TuningEvent]


class CheckpointList(Page):
    data: list[TuningCheckpoint]


@router.post("", response_model=FineTuningJob, responses=errors(404, 415))
async def create_job(body: TuningBody, request: Request, access: Access, state: State) -> Response:
    """Fine-tune the base on a file of examples. The result is an adapter of this server."""
    state.lifecycle.check_admitting()
    tuning, info = _tuning(state), info_of(request.scope)
    state.unknown_fields.warn(body.model_extra or ())
    if body.model not in state.resolver.base_names and body.model != "base":
        raise not_found(
            f"model {body.model[:128]!r} cannot be fine-tuned; this server fine-tunes "
            f"{state.resolver.base_name!r}",
            "model",
            "model_not_found",
        )
    if body.integrations:
        raise invalid(
            "integrations are not supported; losses are in the job's events and in the file of "
            "result_files",
            "integrations",
            "unsupported_parameter",
        )
    method, hyperparameters = _method(body)
    if body.metric is not None and method != "supervised":
        raise invalid(
            f"metric scores answers of supervised jobs, and this job's method is {method!r}; leave "
            "out metric, the steps of dpo show train_accuracy",
            "metric",
        )
    shape = requested_shape(body, state.config.engine.max_lora_rank)
    for param in ("training_file", "validation_file"):
        if (file_id := getattr(body, param)) is not None:
            await _check_file(state, info.tenant, file_id, method, param)
    adapter = None if body.adapter is None else await new_name(body.adapter, access, state)
    id = uuid.uuid4().hex
    base = re.sub(r"[^A-Za-z0-9._-]", "-", state.resolver.base_name.rpartition("/")[2])[:_MAX_BASE]
    job = TuningJob(
        id=f"ftjob-{id}",
        caller=BatchCaller(info.key_id, info.tenant),
        training_file=body.training_file,
        validation_file=body.validation_file,
        status=TuningStatus.VALIDATING,
        created=int(time.time()),
        model=body.model,
        method=method,
        hyperparameters=hyperparameters,
        seed=random.randrange(1 << 31) if body.seed is None else body.seed,
        fine_tuned_model=f"ft:{base}:{body.suffix or ''}:{id[:10]}",
        adapter=adapter,
        metadata=body.metadata,
        metric=body.metric,
        shape=shape.settings(),
    )
    return ORJSONResponse((await tuning.create(job)).to_json())


@router.get("", response_model=JobList, responses=errors())
async def list_jobs(
    request: Request, tenant: Tenant, state: State, limit: Limit = 20, after: After = None
) -> Response:
    """List the newest jobs first. ``?metadata[key]=value`` lists those with this entry."""
    tuning = _tuning(state)
    wanted = {
        match[1]: value
        for name, value in request.query_params.items()
        if (match := _METADATA.fullmatch(name))
    }
    jobs, more = await tuning.do(
        tenant, lambda: tuning.store.jobs(tenant, limit=limit, after=after, metadata=wanted)
    )
    return page_of([job.to_json() for job in jobs], has_more=more)


@router.get("/{job_id}", response_model=FineTuningJob, responses=errors(404))
async def show_job(
    job_id: str,
    tenant: Tenant,
    state: State,
    timeout_s: Annotated[float, Query(ge=0, le=60, allow_inf_nan=False)] = 0.0,
) -> Response:
    """Return the job. ``?timeout_s=30`` waits up to 30 seconds for its end."""
    return ORJSONResponse((await _tuning(state).wait(tenant, job_id, timeout_s)).to_json())


@router.post("/{job_id}/cancel", response_model=FineTuningJob, responses=errors(404, 409))
async def cancel_job(job_id: str, tenant: Tenant, state: State) -> Response:
    """End the job after its present step. Its checkpoints stay."""
    return ORJSONResponse((await _tuning(state).cancel(tenant, job_id)).to_json())


@router.post("/{job_id}/pause", response_model=FineTuningJob, responses=errors(404, 409))
async def pause_job(job_id: str, tenant: Tenant, state: State) -> Response:
    """Stop the job after its present step, until it is resumed."""
    return ORJSONResponse((await _tuning(state).pause(tenant, job_id)).to_json())


@router.post("/{job_id}/resume", response_model=FineTuningJob, responses=errors(404, 409))
async def resume_job(job_id: str, tenant: Tenant, state: State) -> Response:
    state.lifecycle.check_admitting()
    return ORJSONResponse((await _tuning(state).resume(tenant, job_id)).to_json())


@router.get("/{job_id}/events", response_model=EventList, responses=errors(404))
async def list_events(
    job_id: str, tenant: Tenant, state: State, limit: Limit = 20, after: After = None
) -> Response:
    """List the newest events first. The ``data`` of a step has its losses."""
    tuning = _tuning(state)
    events, more = await tuning.do(
        tenant, lambda: tuning.store.events(tenant, job_id, limit=limit, after=after)
    )
    return page_of(events, has_more=more)


@router.get("/{job_id}/checkpoints", response_model=CheckpointList, responses=errors(404))
async def list_checkpoints(
    job_id: str, tenant: Tenant, state: State, limit: Limit = 10, after: After = None
) -> Response:
    """List the newest checkpoints first. Each is an adapter."""
    tuning = _tuning(state)
    checkpoints, more = await tuning.do(
        tenant, lambda: tuning.store.checkpoints(tenant, job_id, limit=limit, after=after)
    )
    return page_of(checkpoints, has_more=more)


def _tuning(state: AppState) -> FineTuning:
    """Raises ApiError (400)."""
    if state.fine_tuning is None:
        raise invalid(
            "this server trains no adapters; start it with --allow-training, or train elsewhere "
            "(loraplex train) and add the adapter",
            None,
            "feature_not_enabled",
        )
    return state.fine_tuning


def _method(body: TuningBody) -> tuple[Method, Hyperparameters]:
    """Return the method and its hyperparameters. Raises ApiError (400)."""
    method = body.method
    kind = "supervised" if method is None else method.type
    if kind == "reinforcement":
        raise invalid(
            "the method 'reinforcement' is not supported; use supervised or dpo",
            "method.type",
            "unsupported_parameter",
        )
    if body.hyperparameters is not None and method is not None:
        raise invalid(
            f"set the hyperparameters in method.{kind}, and not beside it too", "hyperparameters"
        )
    settings = None if method is None else getattr(method, kind)
    values = body.hyperparameters if settings is None else settings.hyperparameters
    fields = ("n_epochs", "batch_size", "learning_rate_multiplier")
    names = (*fields, "beta") if kind == "dpo" else fields
    return kind, {name: getattr(values, name, "auto") for name in names}


async def _check_file(
    state: AppState, tenant: str, file_id: str, method: Method, param: str
) -> None:
    """Raises ApiError: 404, or 400 for a file of another purpose or method."""
    store = state.batches.store
    file = await state.batches.do(tenant, lambda: store.file(tenant, file_id, param=param))
    if file.purpose != "fine-tune":
        raise invalid(
            f"{file_id!r} has the purpose {file.purpose}; upload the examples with "
            "purpose=fine-tune",
            param,
        )
    if file.endpoints != (method,):
        raise invalid(
            f"the lines of {file_id!r} are for the method {file.endpoints[0]!r}, not for "
            f"{method!r}; choose the method, or upload lines of its format",
            param,
        )
