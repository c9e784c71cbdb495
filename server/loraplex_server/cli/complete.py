"""Shell completion: names of adapters from the running server.

The shell waits meanwhile, so a server has one second to answer. Errors complete nothing.
"""

import os

import typer

_TIMEOUT_S = 1.0


def complete_adapter(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return (name, description) pairs from the server of ``--url``, or from those found here."""
    import httpx

    from loraplex_server.model.loading.pull import loraplex_home
    from loraplex_server.running_servers import running_servers

    from .server_client import server_client

    named = ctx.params.get("url") or os.environ.get("LORAPLEX_URL")
    urls = [named] if named else [each.url for each in running_servers(loraplex_home())]
    key = ctx.params.get("api_key") or os.environ.get("LORAPLEX_API_KEY")
    descriptions: dict[str, str] = {}
    for url in urls:
        try:
            with server_client(url, key, _TIMEOUT_S) as client:
                listed = client.get("/v1/adapters").raise_for_status().json()
            for card in listed["data"]:
                descriptions[card["name"]] = card["description"] or ""
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
            continue
    return [
        (name, text) for name, text in sorted(descriptions.items()) if name.startswith(incomplete)
    ]
