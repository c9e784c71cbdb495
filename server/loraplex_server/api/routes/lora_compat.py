"""vLLM's load and unload endpoints, payloads and answers, over our own store."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.responses import PlainTextResponse

from loraplex_adapter_store.put_options import PutOptions
from loraplex_server.adapters.access import access_of, name_to_write, own_name
from loraplex_server.adapters.card_file import told_by_card
from loraplex_server.adapters.sources import source_uri
from loraplex_server.adapters.waiting import result_within
from loraplex_server.api.errors import ApiError
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.protocol.adapters import LoadLoraBody, UnloadLoraBody
from loraplex_server.api.protocol.errors import errors, text_answer
from loraplex_server.api.state import State, followed, in_store_thread

__all__ = ["router"]

router = APIRouter(route_class=JsonRoute)
_RESPONSES = errors(404, 412, 415) | text_answer("done")
_DRAIN_S = 30.0  # an unload waits so long for running requests


@router.post("/v1/load_lora_adapter", response_class=Response, responses=_RESPONSES)
async def load_lora_adapter(body: LoadLoraBody, request: Request, state: State) -> Response:
    state.lifecycle.check_admitting()
    name, path = body.lora_name, body.lora_path
    if not (name and path):
        raise _user_error("Both 'lora_name' and 'lora_path' must be provided.")
    access = access_of(request)
    stored = await in_store_thread(
        state, lambda: name_to_write(state.store, access, name, param="lora_name"), access
    )
    uri = source_uri(state, access, path, param="lora_path")
    options = PutOptions(replace=bool(body.load_inplace), quota=access.quota)
    job = state.jobs.start(
        stored,
        access,
        lambda report: state.store.put_source(stored, uri, options=options, with_card=told_by_card),
    )
    await state.jobs.wait(job, None)
    if job.error is not None and job.error.code == "revision_conflict":
        raise _user_error(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True."
        )
    if job.error is not None:
        raise job.error
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=Response, responses=_RESPONSES)
async def unload_lora_adapter(body: UnloadLoraBody, request: Request, state: State) -> Response:
    state.lifecycle.check_engine()
    name = body.lora_name
    if not name:
        raise _user_error("'lora_name' needs to be provided to unload a LoRA adapter.")
    access = access_of(request)
    await followed(state, access, name, param="lora_name")
    stored = own_name(state.store, access, name, param="lora_name")
    try:
        deletion = await in_store_thread(
            state, lambda: state.store.start_delete(stored), access, pool=state.pools.changes
        )
        await result_within(deletion.freed, _DRAIN_S)
    except ApiError as error:
        if error.status == 404:
            raise ApiError(
                404,
                f"The lora adapter '{name}' cannot be found.",
                code="adapter_not_found",
                kind="NotFoundError",
                param="lora_name",
            ) from error
        raise
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _user_error(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_user_input", kind="InvalidUserInput")
