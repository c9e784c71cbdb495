"""The HTTP client of all commands that call a server. httpx is slow to import: import on use."""

import contextlib
from collections.abc import Iterator
from typing import Any

import httpx

from loraplex_adapter_store.errors import StoreError
from loraplex_server.model.errors import ModelError
from loraplex_server.settings.config import is_loopback

from .failed import failed


class Refused(httpx.HTTPError):
    """An error that the user can act on: the server's answer with its code, or a wrong input."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


def server_root(url: str) -> str:
    """Return ``url`` without the ``/v1`` that OpenAI's clients need and that paths here add."""
    return url.rstrip("/").removesuffix("/v1")


def server_client(url: str, api_key: str | None, timeout: httpx.Timeout | float) -> httpx.Client:
    """Open a client whose paths begin with ``/v1``. Raises httpx.InvalidURL."""
    root = server_root(url)
    return httpx.Client(
        base_url=root,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=timeout,
        # A proxy of the environment cannot reach this machine's own loopback.
        trust_env=not is_loopback(httpx.URL(root).host),
    )


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """Return the JSON object of a successful response. Raises Refused for any other response."""
    try:
        value = response.json()
        if response.is_success and isinstance(value, dict):
            return value
        error = value["error"]
        refused = Refused(str(error["message"]), error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        refused = Refused(
            f"{response.request.url} answered {response.status_code} without the JSON of a "
            "loraplex server",
            None,
        )
    raise refused


@contextlib.contextmanager
def reached(url: str) -> Iterator[None]:
    """Raise Refused with a remedy if the server at ``url`` cannot be reached."""
    try:
        yield
    except httpx.InvalidURL as error:
        raise Refused(f"{url} is no URL: {error}", None) from error
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        message = f"no server answers at {server_root(url)}; run `loraplex serve`, or give its URL"
        raise Refused(message, None) from error
    except httpx.RequestError as error:
        broken = f"the connection to {server_root(url)} broke: {error or type(error).__name__}"
        raise Refused(broken, None) from error


@contextlib.contextmanager
def errors_in_red() -> Iterator[None]:
    """Print expected errors as one red line and exit with status 1."""
    try:
        yield
    except (StoreError, ModelError, OSError, httpx.HTTPError) as error:
        raise failed(error) from None
