"""The console: a page at ``/`` and its files.

They hold nothing of the server, so they are open; what the page asks for needs the key.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from loraplex_server.api.console_files import console_file
from loraplex_server.api.errors import not_found

__all__ = ["router"]

router = APIRouter(include_in_schema=False)


@router.head("/")
@router.get("/")
async def page(request: Request) -> Response:
    return _answer(request, "index.html")


@router.head("/console/{name}")
@router.get("/console/{name}")
async def asset(request: Request, name: str) -> Response:
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    """Browsers ask each time, and get it again only if it has changed."""
    file = None if len(name) > 64 else console_file(name)
    if file is None:
        raise not_found(f"the console has no file {name[:64]!r}", "name", "unknown_url")
    headers = {"etag": file.etag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
