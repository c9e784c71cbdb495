"""Tinker's API, for its Python package: sessions, training clients, sampling clients, checkpoints.

Most calls are answered at once with the id of a result, which the client fetches when it is there.
An error of such a call is its result, since calls of a training client are numbered and none may be
missing.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.names.selector import NameRef
from loraplex_server.adapters.tinker.checkpoints import Checkpoint, Run
from loraplex_server.adapters.tinker.sessions import Sampler, Session, TrainingRun
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.body import Body
from loraplex_server.api.request_info import RequestInfo, info_of
from loraplex_server.api.state import AppState, State, Tenant, in_change_thread
from loraplex_server.engine.errors import EngineError
from loraplex_server.errors import (
    ApiError,
    from_engine,
    from_store,
    from_unexpected,
    invalid,
    not_found,
)
from loraplex_server.health_tracker import log_extra
from loraplex_training.errors import TrainingError

from . import tinker_runs as runs
from .tinker_messages import read_forward_backward
from .tinker_protocol import (
    CreateModelBody,
    FutureBody,
    LifeBody,
    LoadWeightsBody,
    OfModel,
    OfSampler,
    OfSession,
    OptimStepBody,
    PathBody,
    SampleBody,
    SamplingSessionBody,
    SaveForSamplerBody,
    SaveWeightsBody,
    SessionBody,
)
from .tinker_sampling import check_sample, start_sampling

# The package documents the protocol, which is its own.
router = APIRouter(prefix="/api/v1", route_class=JsonRoute, include_in_schema=False)
_PROTOBUF = "application/x-protobuf"
_log = logging.getLogger(__name__)
_POLL_S = 20.0  # a client waits 45 s for an answer
_NOTE = (
    "This server trains LoRAs on attention and MLP layers; train_unembed has no effect. Weights "
    "of save_weights_and_get_sampling_client live as long as this session."
)
Page = Annotated[int, Query(ge=0, le=1 << 31)]


async def _info_of(request: Request) -> RequestInfo:
    return info_of(request.scope)


Info = Annotated[RequestInfo, Depends(_info_of)]


@router.get("/healthz")
async def healthz(state: State) -> Response:
    state.lifecycle.check_engine()
    return ORJSONResponse({"status": "ok"})


@router.post("/client/config")
@router.post("/client/dynamic_config")
async def client_config(body: Body) -> Response:
    """Return the features that the client asks for at its start, and again every few minutes."""
    flags = ("sample_join_sampling_session", "sample_cancel_enabled", "sample_no_retries")
    return ORJSONResponse({"pjwt_auth_enabled": False, **dict.fromkeys(flags, True)})


@router.post("/telemetry")
async def telemetry(body: Body) -> Response:
    """Take what the client says about itself, and keep none of it."""
    return ORJSONResponse({"status": "accepted"})


@router.get("/get_server_capabilities")
async def get_server_capabilities(state: State) -> Response:
    model = {
        "max_context_length": state.engine.max_model_len,
        "trainable": runs.trains(state),
        "sampleable": True,
    }
    models = [{"model_name": name, **model} for name in state.resolver.base_names]
    return ORJSONResponse({"supported_models": models})


@router.post("/create_session")
async def create_session(body: SessionBody, info: Info, state: State) -> Response:
    state.lifecycle.check_admitting()
    session = state.sessions.create(info.tenant, info.access, body.user_metadata)
    shown = {"type": "create_session", "session_id": session.id, "info_message": _NOTE}
    return ORJSONResponse(shown)


@router.post("/session_heartbeat")
async def session_heartbeat(body: OfSession, tenant: Tenant, state: State) -> Response:
    try:
        state.sessions.find(body.session_id, tenant)
    except ApiError as error:
        raise _gone(error.message) from None  # the client then stops its heartbeats
    return ORJSONResponse({"type": "session_heartbeat"})


@router.post("/sessions/{session_id}/finish")
async def finish_session(session_id: str, tenant: Tenant, state: State) -> Response:
    await state.sessions.end(state.sessions.find(session_id, tenant))
    return Response(status_code=204)


@router.get("/sessions")
async def list_sessions(
    tenant: Tenant, state: State, limit: Page = 20, offset: Page = 0
) -> Response:
    ids = [session.id for session in state.sessions.of_tenant(tenant)]
    return ORJSONResponse({"sessions": ids[offset : offset + limit]})


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, tenant: Tenant, state: State) -> Response:
    session = state.sessions.find(session_id, tenant)
    shown = {
        "training_run_ids": list(session.runs),
        "sampler_ids": list(session.samplers),
        "user_metadata": session.metadata,
    }
    return ORJSONResponse(shown)


@router.post("/create_model")
async def create_model(body: CreateModelBody, tenant: Tenant, state: State) -> Response:
    state.lifecycle.check_admitting()
    session = state.sessions.find(body.session_id, tenant)
    runs.check_base(state, body.base_model)
    run = runs.new_run(session, body.model_seq_id, body)
    seed = body.lora_config.seed
    work = partial(runs.create, state, session, run, seed, None)
    return _started(session, f"{run.id}:0", work, run.id)


@router.post("/load_weights")
async def load_weights(body: LoadWeightsBody, tenant: Tenant, state: State) -> Response:
    """Load a checkpoint into a training client, or into a new one of the session."""
    state.lifecycle.check_admitting()
    if body.model_id is not None and body.seq_id:
        training = state.sessions.find_run(body.model_id, tenant)
        return _in_turn(training, body.seq_id, partial(runs.load, state, training, body))
    if body.session_id is None or body.model_seq_id is None:
        raise invalid("give session_id and model_seq_id, or model_id and seq_id", "session_id")
    if body.base_model is not None:
        runs.check_base(state, body.base_model)
    session = state.sessions.find(body.session_id, tenant)
    saved, _ = state.checkpoints.find(tenant, body.path)
    run = Run(
        f"{session.id}:train:{body.model_seq_id}",
        saved.base,
        saved.rank,
        saved.train_attn,
        saved.train_mlp,
        body.user_metadata,
        time.time(),
    )
    return _started(
        session, f"{run.id}:0", partial(runs.create, state, session, run, 0, body), run.id
    )


@router.post("/get_info")
async def get_info(body: OfModel, tenant: Tenant, state: State) -> Response:
    run = state.sessions.find_run(body.model_id, tenant).run
    shown = {
        "type": "get_info",
        "model_data": {"model_name": run.base, "tokenizer_id": run.base},
        "model_id": run.id,
        "is_lora": True,
        "lora_rank": run.rank,
        "model_name": run.base,
    }
    return ORJSONResponse(shown)


@router.post("/forward_backward")
async def forward_backward(request: Request, info: Info, state: State) -> Response:
    """Take a binary message: sequences, and the loss whose gradient is added."""
    state.lifecycle.check_admitting()
    if request.headers.get("content-type", "").partition(";")[0].strip() != _PROTOBUF:
        raise ApiError(415, f"send {_PROTOBUF}", code="unsupported_media_type")
    call = read_forward_backward(await request.body())
    training = state.sessions.find_run(call.model_id, info.tenant)
    if call.seq_id < 1:
        raise invalid("seq_id must be at least 1", "seq_id")
    if info.meter is not None and training.session.call(f"{training.id}:{call.seq_id}") is None:
        await info.meter.reserve_tokens(sum(len(datum.tokens) for datum in call.data))
    return _in_turn(training, call.seq_id, partial(runs.forward_backward, state, training, call))


@router.post("/optim_step")
async def optim_step(body: OptimStepBody, tenant: Tenant, state: State) -> Response:
    training = state.sessions.find_run(body.model_id, tenant)
    work = partial(runs.optim_step, state, training, body.adam_params)
    return _in_turn(training, body.seq_id, work)


@router.post("/save_weights")
async def save_weights(body: SaveWeightsBody, tenant: Tenant, state: State) -> Response:
    training = state.sessions.find_run(body.model_id, tenant)
    work = partial(
        runs.save_weights,
        state,
        training,
        body.path,
        life_s=body.ttl_seconds,
        overwrite=body.overwrite,
        metadata=body.user_metadata,
    )
    return _in_turn(training, body.seq_id, work)


@router.post("/save_weights_for_sampler")
async def save_for_sampler(body: SaveForSamplerBody, tenant: Tenant, state: State) -> Response:
    training = state.sessions.find_run(body.model_id, tenant)
    return _in_turn(training, body.seq_id, partial(runs.save_for_sampler, state, training, body))


@router.post("/create_sampling_session")
async def create_sampling_session(
    body: SamplingSessionBody, tenant: Tenant, state: State
) -> Response:
    session = state.sessions.find(body.session_id, tenant)
    ref = None
    if body.model_path is not None:
        _, saved = state.checkpoints.find(tenant, body.model_path)
        if saved.kind != "sampler_weights":
            raise invalid(
                f"{body.model_path} is a state to train further; sample from one that "
                "save_weights_for_sampler wrote",
                "model_path",
            )
        ref = None if saved.adapter is None else NameRef(saved.adapter)
    elif body.base_model is not None:
        runs.check_base(state, body.base_model)
    else:
        raise invalid("give base_model or model_path", "base_model")
    sampler_id = f"{session.id}:sample:{body.sampling_session_seq_id}"
    sampler = session.add_sampler(Sampler(sampler_id, ref, body.model_path))
    return ORJSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler.id})


@router.post("/join_sampling_session")
async def join_sampling_session(body: OfSampler, tenant: Tenant, state: State) -> Response:
    """Give a number to a copy of a sampling client, in another process."""
    session, _ = _sampler(state, tenant, body.sampling_session_id)
    counter = next(session.clones)
    return ORJSONResponse({"type": "join_sampling_session", "client_counter": counter})


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, tenant: Tenant, state: State) -> Response:
    _, sampler = _sampler(state, tenant, sampler_id)
    base = state.resolver.base_name
    shown = {"sampler_id": sampler.id, "base_model": base, "model_path": sampler.path}
    return ORJSONResponse(shown)


@router.post("/asample")
async def asample(body: SampleBody, info: Info, state: State) -> Response:
    state.lifecycle.check_admitting()
    session, sampler = _sampler(state, info.tenant, body.sampling_session_id)
    ids = check_sample(state, info, body)
    call_id = f"{sampler.id}:{body.seq_id}"
    if session.call(call_id) is None:
        work = await start_sampling(state, info, call_id, sampler, body, ids)
        session.start(call_id, partial(_shown_errors, call_id, work))
    sequences = [f"{call_id}-{index}" for index in range(body.num_samples)]
    return ORJSONResponse({"request_id": call_id, "sample_sequence_ids": sequences})


@router.post("/cancel_future")
async def cancel_future(body: FutureBody, tenant: Tenant, state: State) -> Response:
    """Stop sampling. Calls of training clients keep their turns."""
    session = state.sessions.find(body.request_id.partition(":")[0], tenant)
    call = session.call(body.request_id)
    if call is not None and ":sample:" in body.request_id:
        call.cancel()
        session.fetched(body.request_id)
    return Response(status_code=204)


@router.post("/retrieve_future")
async def retrieve_future(body: FutureBody, tenant: Tenant, state: State) -> Response:
    """Return the result of a call; 408 while it is not there, 410 if it is there no more."""
    session = state.sessions.find(body.request_id.partition(":")[0], tenant)
    call = session.call(body.request_id)
    if call is None:
        raise _gone(f"there is no result {body.request_id!r}: it was fetched or never requested")
    await asyncio.wait([call], timeout=_POLL_S)
    if not call.done():
        waiting = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return ORJSONResponse(waiting, status=408)
    if call.cancelled():
        raise _gone(f"the call {body.request_id!r} was cancelled")
    session.fetched(body.request_id)
    if (error := call.exception()) is not None:
        assert isinstance(error, ApiError)
        category = "user" if error.status < 500 else "server"
        return ORJSONResponse({"error": error.message, "category": category})
    result = call.result()
    if isinstance(result, bytes):
        return Response(result, media_type=_PROTOBUF)
    return ORJSONResponse(result)


@router.post("/weights_info")
async def weights_info(body: PathBody, tenant: Tenant, state: State) -> Response:
    run, _ = state.checkpoints.find(tenant, body.tinker_path)
    shown = {
        "base_model": run.base,
        "is_lora": True,
        "lora_rank": run.rank,
        "train_unembed": False,
        "train_mlp": run.train_mlp,
        "train_attn": run.train_attn,
    }
    return ORJSONResponse(shown)


@router.get("/training_runs")
async def list_training_runs(
    tenant: Tenant, state: State, limit: Page = 20, offset: Page = 0
) -> Response:
    found = _runs(state, tenant)
    shown = [_run_shown(state, tenant, run) for run in found[offset : offset + limit]]
    return ORJSONResponse({"training_runs": shown, "cursor": _cursor(found, limit, offset)})


@router.get("/training_runs/{run_id}")
async def get_training_run(run_id: str, tenant: Tenant, state: State) -> Response:
    return ORJSONResponse(_run_shown(state, tenant, _run(state, tenant, run_id)))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_checkpoints(run_id: str, tenant: Tenant, state: State) -> Response:
    _run(state, tenant, run_id)
    found = state.checkpoints.saved(tenant, run_id)
    return ORJSONResponse({"checkpoints": [_checkpoint_shown(each) for each in found]})


@router.get("/checkpoints")
async def list_all_checkpoints(
    tenant: Tenant, state: State, limit: Page = 100, offset: Page = 0
) -> Response:
    found = state.checkpoints.saved(tenant)
    shown = [_checkpoint_shown(each) for each in found[offset : offset + limit]]
    return ORJSONResponse({"checkpoints": shown, "cursor": _cursor(found, limit, offset)})


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}")
async def delete_checkpoint(
    run_id: str, kind: str, name: str, info: Info, state: State
) -> Response:
    _, found = state.checkpoints.find(info.tenant, f"tinker://{run_id}/{kind}/{name}")
    if found.adapter is not None:
        await runs.delete_adapter(state, info.access, found.adapter)
    delete = partial(state.checkpoints.delete, info.tenant, found)
    await in_change_thread(state, delete, info.access)
    return Response(status_code=204)


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl")
async def set_ttl(
    run_id: str, kind: str, name: str, body: LifeBody, info: Info, state: State
) -> Response:
    """Let the checkpoint expire after ``ttl_seconds``, or never."""
    expires = None if body.ttl_seconds is None else time.time() + body.ttl_seconds
    _, found = state.checkpoints.find(info.tenant, f"tinker://{run_id}/{kind}/{name}")

    def change() -> None:
        if found.adapter is not None:
            state.store.set_expiry(info.access.own(found.adapter), expires)
        state.checkpoints.set_expiry(info.tenant, found.path, expires)

    await in_change_thread(state, change, info.access)
    return Response(status_code=204)


def _started(
    session: Session, call_id: str, work: Callable[[], Awaitable[object]], model_id: str
) -> Response:
    session.start(call_id, partial(_shown_errors, call_id, work))
    return ORJSONResponse({"request_id": call_id, "model_id": model_id})


async def _shown_errors(call_id: str, work: Callable[[], Awaitable[object]]) -> object:
    """Run ``work``. Raises its error as clients see it."""
    try:
        return await work()
    except ApiError:
        raise
    except StoreError as error:
        raise from_store(error, param="path") from error
    except EngineError as error:
        raise from_engine(error) from error
    except TrainingError as error:
        raise invalid(str(error), None, "training_failed") from error
    except Exception as error:
        _log.exception("the call %s failed", call_id, extra=log_extra(error))
        raise from_unexpected(error, call_id) from error


def _in_turn(training: TrainingRun, number: int, work: Callable[[], Awaitable[object]]) -> Response:
    call_id = f"{training.id}:{number}"
    return _started(training.session, call_id, lambda: training.in_turn(number, work), training.id)


def _sampler(state: AppState, tenant: str, sampler_id: str) -> tuple[Session, Sampler]:
    """Raises ApiError (404)."""
    session = state.sessions.find(sampler_id.partition(":")[0], tenant)
    sampler = session.samplers.get(sampler_id)
    if sampler is None:
        raise not_found(
            f"there is no sampling client {sampler_id[:120]!r}", "sampling_session_id", "no_sampler"
        )
    return session, sampler


def _runs(state: AppState, tenant: str) -> list[Run]:
    """Return the open runs and those with checkpoints, the last used first."""
    found = {run.id: run for run in state.checkpoints.runs(tenant)}
    for session in state.sessions.of_tenant(tenant):
        found |= {run.id: run.run for run in session.runs.values()}
    return sorted(found.values(), key=lambda run: run.used, reverse=True)


def _run(state: AppState, tenant: str, run_id: str) -> Run:
    """Raises ApiError (404)."""
    for run in _runs(state, tenant):
        if run.id == run_id:
            return run
    raise not_found(f"there is no training run {run_id[:120]!r}", "training_run_id", "no_run")


def _run_shown(state: AppState, tenant: str, run: Run) -> dict[str, object]:
    saved = state.checkpoints.saved(tenant, run.id)
    last = {
        kind: next((_checkpoint_shown(each) for each in saved if each.kind == kind), None)
        for kind in ("weights", "sampler_weights")
    }
    return {
        "training_run_id": run.id,
        "base_model": run.base,
        "model_owner": tenant or "operator",
        "is_lora": True,
        "lora_rank": run.rank,
        "last_request_time": _time(run.used),
        "last_checkpoint": last["weights"],
        "last_sampler_checkpoint": last["sampler_weights"],
        "user_metadata": run.metadata,
    }


def _checkpoint_shown(checkpoint: Checkpoint) -> dict[str, object]:
    return {
        "checkpoint_id": f"{checkpoint.kind}/{checkpoint.name}",
        "checkpoint_type": "training" if checkpoint.kind == "weights" else "sampler",
        "time": _time(checkpoint.created),
        "tinker_path": checkpoint.path,
        "size_bytes": checkpoint.n_bytes or None,
        "public": False,
        "user_metadata": checkpoint.metadata,
        "expires_at": None if checkpoint.expires is None else _time(checkpoint.expires),
    }


def _cursor(found: list[Run] | list[Checkpoint], limit: int, offset: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": len(found)}


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _gone(message: str) -> ApiError:
    return ApiError(410, message, code="gone", kind="invalid_request_error")
