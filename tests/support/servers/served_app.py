"""Serves an application on real sockets, from a thread of the test's process."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from loraplex_server.limited_http import LimitedHttp


@contextmanager
def served_app(app: FastAPI) -> Iterator[str]:
    """Yield the URL. Connections have a second to end when the block ends."""
    options = {"lifespan": "off", "log_config": None, "access_log": False, "ws": "none"}
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=LimitedHttp,
            timeout_graceful_shutdown=1,
            **options,  # type: ignore[arg-type]
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:

        async def main() -> None:
            await server.serve(sockets=[listening])
            await app.state.parts.text.close()
            await app.state.parts.file_checks.close()

        thread = threading.Thread(target=asyncio.run, args=[main()])
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
