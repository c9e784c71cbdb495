"""Version and metrics."""

from __future__ import annotations

from importlib.metadata import version as installed_version

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from loraplex_server.adapters.access import access_of
from loraplex_server.api.errors import ApiError
from loraplex_server.api.guide_files import GUIDE
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors, text_answer
from loraplex_server.api.protocol.health import Version
from loraplex_server.api.request_info import info_of
from loraplex_server.api.state import AppState, State, in_store_thread

__all__ = ["router"]

router = APIRouter()


@router.get("/version", response_model=Version, responses=errors())
async def version(request: Request, state: State) -> Response:
    features = {
        "generate": state.generated is not None,
        "learn": state.learning is not None,
        "train": state.training is not None,
        "route": state.semantic is not None,
        "cluster": state.fleet is not None,
        "guide": state.config.http.console and (GUIDE / "index.html").is_file(),
    }
    told = {
        "version": installed_version("loraplex"),
        "features": features,
        "may_change": info_of(request.scope).may_change,
        "sees_all": access_of(request).sees_all,
    }
    return ORJSONResponse(told)


@router.get("/metrics", response_class=Response, responses=errors() | text_answer("for Prometheus"))
async def metrics(request: Request, state: State) -> Response:
    if not access_of(request).sees_all:
        raise ApiError(
            403,
            "the metrics tell of all adapters and tenants; use the operator's API key or one with "
            "the scope metrics, or start with --public-metrics",
            code="metrics_not_allowed",
        )
    page = _own_page if state.fleet is None else state.fleet.metrics_page
    return Response(await page(state), headers={"content-type": CONTENT_TYPE_LATEST})


async def _own_page(state: AppState) -> bytes:
    """Of this process, which is all there is."""
    await in_store_thread(state, state.collector.refresh_listing)
    return generate_latest(state.registry)
