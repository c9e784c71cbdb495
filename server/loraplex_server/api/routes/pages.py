"""The console at ``/`` and the guide at ``/guide``.

Their files hold no data of the server and need no API key. The console's own requests do.
"""

from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from loraplex_server.api.static_pages import CONSOLE, GUIDE
from loraplex_server.errors import not_found

_CONSOLE_FILES = frozenset({"console.css", "console.js", "favicon.svg", "index.html"})
_NOT_BUILT = "The guide is not built here: run `make docs`, then start the server again.\n"

console_router = APIRouter(include_in_schema=False)
_console = StaticFiles(directory=CONSOLE)


@console_router.head("/")
@console_router.get("/")
async def console_page(request: Request) -> Response:
    return await _console_answer(request, "index.html")


@console_router.head("/console/{name}")
@console_router.get("/console/{name}")
async def console_asset(request: Request, name: str) -> Response:
    return await _console_answer(request, name)


async def _console_answer(request: Request, name: str) -> Response:
    if name not in _CONSOLE_FILES:
        raise not_found(f"the console has no file {name[:64]!r}", "name", "unknown_url")
    return _revalidated(await _console.get_response(name, request.scope))


def _revalidated(answer: Response) -> Response:
    """Let browsers ask each time. They download a file only if it has changed."""
    answer.headers["cache-control"] = "no-cache"
    return answer


def guide_router(folder: Path = GUIDE) -> APIRouter:
    """Serve ``folder``. Without an index page, answer 404 and say how to build the guide."""
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=folder, html=True, check_dir=False)

    @router.head("/guide")
    @router.get("/guide")
    async def start() -> Response:
        return RedirectResponse("/guide/")

    @router.head("/guide/{path:path}")
    @router.get("/guide/{path:path}")
    async def page(request: Request, path: str) -> Response:
        if not (folder / "index.html").is_file():  # it may be built while the server runs
            return PlainTextResponse(_NOT_BUILT, 404)
        try:
            answer = await files.get_response(path, request.scope)
        except HTTPException:
            return PlainTextResponse("The guide has no such page.\n", 404)
        if isinstance(answer, RedirectResponse):  # to a folder; never built from the Host header
            return RedirectResponse(f"/guide/{path}/")
        return _revalidated(answer)

    return router
