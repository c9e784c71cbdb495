"""What the shell offers after Tab: adapters of the server that runs, scenarios of the checkout.

A shell waits for this, so a server has a second to answer, and any trouble is no offer.
"""

from __future__ import annotations

import os
from pathlib import Path

import typer

__all__ = ["complete_adapter", "complete_scenario"]

_TIMEOUT_S = 1.0
_SCENARIOS = Path(__file__).parents[3] / "loadtests" / "scenarios"


def complete_adapter(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """(name, what it is good at) of the server of ``--url``, or of those on this machine."""
    import httpx

    from loraplex_server.model.pull import loraplex_home
    from loraplex_server.running_servers import running_servers

    from .server_client import server_client

    named = ctx.params.get("url") or os.environ.get("LORAPLEX_URL")
    urls = [named] if named else [server.url for server in running_servers(loraplex_home())]
    key = ctx.params.get("api_key") or os.environ.get("LORAPLEX_API_KEY")
    found: dict[str, str] = {}
    for url in urls:
        try:
            with server_client(url, key, _TIMEOUT_S) as client:
                listed = client.get("/v1/adapters").raise_for_status().json()
            for card in listed["data"]:
                found[card["name"]] = card["description"] or ""
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
            continue
    return [(name, text) for name, text in sorted(found.items()) if name.startswith(incomplete)]


def complete_scenario(incomplete: str) -> list[str]:
    names = ["list", *(path.stem for path in sorted(_SCENARIOS.glob("*.toml")))]
    return [name for name in names if name.startswith(incomplete)]
