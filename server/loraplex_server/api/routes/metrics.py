"""Version and metrics."""

from importlib.metadata import version as installed_version

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.errors import errors, text_answer
from loraplex_server.api.protocol.health import Version
from loraplex_server.api.request_info import access_of, info_of
from loraplex_server.api.state import State, in_store_thread
from loraplex_server.api.static_pages import GUIDE
from loraplex_server.errors import ApiError

router = APIRouter(tags=["Watching"])


@router.get("/version", response_model=Version, responses=errors())
async def version(request: Request, state: State) -> Response:
    features = {
        "generate": state.makers.generated is not None,
        "learn": state.makers.learning is not None,
        "train": state.makers.training is not None,
        "route": state.semantic is not None,
        "cluster": state.fleet is not None,
        "images": state.text.images is not None,
        "guide": state.config.http.console and (GUIDE / "index.html").is_file(),
    }
    shown = {
        "version": installed_version("loraplex"),
        "features": features,
        "may_change": info_of(request.scope).may_change,
        "sees_all": access_of(request).sees_all,
    }
    return ORJSONResponse(shown)


@router.get(
    "/metrics",
    response_class=Response,
    responses=errors() | text_answer("the metrics in Prometheus' format"),
)
async def metrics(request: Request, state: State) -> Response:
    if not access_of(request).sees_all:
        raise ApiError(
            403,
            "the metrics show all adapters and tenants; use the operator's API key or a key with "
            "the scope metrics, or start with --public-metrics",
            code="metrics_not_allowed",
        )
    if state.fleet is None:
        await in_store_thread(state, state.collector.refresh_listing)
        page = generate_latest(state.registry)
    else:
        page = await state.fleet.metrics_page(state.collector)
    return Response(page, headers={"content-type": CONTENT_TYPE_LATEST})
