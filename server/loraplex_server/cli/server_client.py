"""The HTTP client of all commands that ask a server. Imported on use: httpx takes a while."""

from __future__ import annotations

from typing import Any

import httpx

from loraplex_server.settings import is_loopback

__all__ = ["Refused", "answer_of", "server_client", "server_root"]


class Refused(httpx.HTTPError):
    """What the server says, in its own words; or its status, if it has none."""

    def __init__(self, message: str, code: str | None) -> None:
        super().__init__(message)
        self.code = code


def server_root(url: str) -> str:
    """Without ``/v1``, which OpenAI's clients want and paths here begin with."""
    return url.rstrip("/").removesuffix("/v1")


def server_client(url: str, api_key: str | None, timeout: httpx.Timeout | float) -> httpx.Client:
    """Paths begin with ``/v1``; ``timeout`` in seconds. Raises httpx.InvalidURL."""
    root = server_root(url)
    return httpx.Client(
        base_url=root,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        timeout=timeout,
        # A proxy of the environment cannot reach this machine's own loopback.
        trust_env=not is_loopback(httpx.URL(root).host),
    )


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """The JSON object of a success. Raises Refused; with the status if no server of ours spoke."""
    try:
        value = response.json()
        if response.is_success and isinstance(value, dict):
            return value
        error = value["error"]
        refused = Refused(str(error["message"]), error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        told = f"answered {response.status_code} without the JSON of a loraplex server"
        refused = Refused(f"{response.request.url} {told}", None)
    raise refused
