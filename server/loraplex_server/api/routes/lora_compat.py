"""vLLM's routes to load and unload adapters, with vLLM's payloads and answers."""

from fastapi import APIRouter, Response
from starlette.responses import PlainTextResponse

from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_server.adapters.adding.card_file import fill_from_card
from loraplex_server.adapters.adding.sources import source_uri
from loraplex_server.adapters.resolving.access import own_name
from loraplex_server.adapters.worker_pools import result_within
from loraplex_server.api.adapter_path import new_name
from loraplex_server.api.json_route import JsonRoute
from loraplex_server.api.protocol.adapters import LoadLoraBody, UnloadLoraBody
from loraplex_server.api.protocol.errors import errors, text_answer
from loraplex_server.api.state import (
    Access,
    State,
    allowed_sources,
    followed,
    in_change_thread,
)
from loraplex_server.errors import ApiError

router = APIRouter(route_class=JsonRoute, tags=["Routes of other servers"])
_RESPONSES = errors(404, 412, 415) | text_answer("done")
_DRAIN_S = 30.0  # the longest wait of an unload for running requests


@router.post("/v1/load_lora_adapter", response_class=Response, responses=_RESPONSES)
async def load_lora_adapter(body: LoadLoraBody, access: Access, state: State) -> Response:
    state.lifecycle.check_admitting()
    name, path = body.lora_name, body.lora_path
    if not (name and path):
        raise _user_error("Both 'lora_name' and 'lora_path' must be provided.")
    stored = await new_name(name, access, state, param="lora_name")
    uri = source_uri(allowed_sources(state), access, path, param="lora_path")
    options = PutOptions(replace=bool(body.load_inplace), quota=access.quota)
    job = state.jobs.start(
        stored,
        access,
        lambda report: state.store.put_source(
            stored, uri, options=options, with_card=fill_from_card
        ),
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
async def unload_lora_adapter(body: UnloadLoraBody, access: Access, state: State) -> Response:
    state.lifecycle.check_engine()
    name = body.lora_name
    if not name:
        raise _user_error("'lora_name' needs to be provided to unload a LoRA adapter.")
    await followed(state, access, name, param="lora_name")
    stored = own_name(state.store, access, name, param="lora_name")
    try:
        deletion = await in_change_thread(state, lambda: state.store.start_delete(stored), access)
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
