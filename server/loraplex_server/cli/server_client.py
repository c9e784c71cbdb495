"""The HTTP client of all commands that ask a server. Imported on use: httpx takes a while."""

from __future__ import annotations

import httpx

from loraplex_server.settings import is_loopback

__all__ = ["server_client", "server_root"]


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
