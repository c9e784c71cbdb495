"""The documentation at ``/guide``. It holds nothing of the server, so it is open."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from loraplex_server.api.guide_files import GUIDE

__all__ = ["guide_router"]

_NOT_BUILT = "The guide is not built here: run `make docs`, then start the server again.\n"


def guide_router(folder: Path = GUIDE) -> APIRouter:
    """Serves ``folder`` if it holds a page now, else a 404 that says how it is built."""
    router = APIRouter(include_in_schema=False)
    is_built = (folder / "index.html").is_file()
    files = StaticFiles(directory=folder, html=True) if is_built else None

    @router.head("/guide")
    @router.get("/guide")
    async def start() -> Response:
        return RedirectResponse("/guide/")

    @router.head("/guide/{path:path}")
    @router.get("/guide/{path:path}")
    async def page(request: Request, path: str) -> Response:
        if files is None:
            return PlainTextResponse(_NOT_BUILT, 404)
        try:
            answer = await files.get_response(path, request.scope)
        except HTTPException:
            return PlainTextResponse("The guide has no such page.\n", 404)
        if isinstance(answer, RedirectResponse):  # to the folder, whatever a proxy calls this host
            return RedirectResponse(f"/guide/{path}/")
        answer.headers["cache-control"] = "no-cache"  # asked for each time, sent if it has changed
        return answer

    return router
