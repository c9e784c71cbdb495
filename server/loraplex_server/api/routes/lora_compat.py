"""vLLM's load and unload endpoints, payloads and answers, over our own store."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.responses import PlainTextResponse

from loraplex_server.adapters.access import access_of, check_allowed
from loraplex_server.adapters.sources import source_uri
from loraplex_server.api.errors import ApiError
from loraplex_server.api.openapi import body_of
from loraplex_server.api.protocol.generation import LoadLoraBody, UnloadLoraBody
from loraplex_server.api.state import in_store_thread, state_of

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/load_lora_adapter", openapi_extra=body_of(LoadLoraBody))
async def load_lora_adapter(request: Request) -> Response:
    services = state_of(request)
    services.lifecycle.check_admitting()
    _need_json(request)
    body = await services.parser.parse(request, LoadLoraBody)
    name, path = body.lora_name, body.lora_path
    if not (name and path):
        raise _user_error("Both 'lora_name' and 'lora_path' must be provided.")
    check_allowed(access_of(request), name, param="lora_name")
    uri = source_uri(services, path, param="lora_path")
    try:
        await in_store_thread(
            services,
            lambda: services.store.put_source(name, uri, replace=bool(body.load_inplace)),
        )
    except ApiError as error:
        if error.code == "revision_conflict":
            raise _user_error(
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            ) from error
        raise
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/v1/unload_lora_adapter", openapi_extra=body_of(UnloadLoraBody))
async def unload_lora_adapter(request: Request) -> Response:
    services = state_of(request)
    _need_json(request)
    body = await services.parser.parse(request, UnloadLoraBody)
    name = body.lora_name
    if not name:
        raise _user_error("'lora_name' needs to be provided to unload a LoRA adapter.")
    check_allowed(access_of(request), name, param="lora_name")
    try:
        await in_store_thread(services, lambda: services.store.delete(name))
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


def _need_json(request: Request) -> None:
    """A form or text/plain body is what a foreign web page can send without being asked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "send application/json", code="unsupported_media_type")
