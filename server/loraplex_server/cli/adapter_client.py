"""The client behind `loraplex adapters`: the adapters of a running server."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer

from loraplex_adapter_store.contents.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.sources.local import read_card, read_directory
from loraplex_server.model.loading.pull import loraplex_home
from loraplex_server.running_servers import running_servers

from .server_client import Refused, answer_of, reached, server_client

_TIMEOUT_S = 600.0
FULL = {"report": "full"}  # query for cards with their whole load report


def find_server(url: str | None) -> str:
    """Return ``url``, or the URL of the server on this machine. Raises typer.BadParameter."""
    if url:
        return url
    urls = [server.url for server in running_servers(loraplex_home())]
    if not urls:
        raise typer.BadParameter(
            "no server runs on this machine: start `loraplex serve`, or name a server with --url"
        )
    if len(urls) > 1:
        raise typer.BadParameter(
            f"several servers run here; choose one with --url: {', '.join(urls)}"
        )
    typer.secho(f"using the server at {urls[0]}", dim=True, err=True)
    return urls[0]


class AdapterClient:
    """Calls /v1/adapters. Raises Refused with the server's own message."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._api_key = api_key

    def call(
        self, method: str, name: str = "", headers: dict[str, str] | None = None, **body: Any
    ) -> dict[str, Any]:
        """``name`` may end in an action of the adapter, such as ``/unload``."""
        path = "/v1/adapters" + (f"/{quote(name)}" if name else "")
        with reached(self._url), server_client(self._url, self._api_key, _TIMEOUT_S) as client:
            return answer_of(client.request(method, path, headers=headers, **body))

    def add(
        self,
        name: str,
        source: str,
        description: str | None,
        examples: Sequence[str],
        *,
        replace: bool,
    ) -> dict[str, Any]:
        """Upload a folder of this machine; the server fetches any other source itself.

        Raises StoreError for a folder that holds no adapter.
        """
        headers = {} if replace else {"If-None-Match": "*"}
        if Path(source).is_dir():
            return self._upload(name, Path(source).resolve(), description, examples, headers)
        body = {
            "source": source,
            "description": description,
            "examples": list(examples),
            "wait": True,
        }
        try:
            return self.call("PUT", name, headers, params=FULL, json=body)
        except Refused as error:
            if "://" in source or error.code not in ("source_forbidden", "source_not_found"):
                raise
            message = f"there is no folder {source!r} on this machine, and the server says: {error}"
            raise Refused(message, error.code) from None

    def _upload(
        self,
        name: str,
        folder: Path,
        description: str | None,
        examples: Sequence[str],
        headers: dict[str, str],
    ) -> dict[str, Any]:
        """Send the files that the store would read from the folder."""
        limits = StoreLimits()
        read = read_directory(folder, limits)
        files: dict[str, Any] = {"config": (CONFIG_FILE, read.config)}
        files |= {part: (part, data) for part, data in read.companions.items()}
        if read.chat_template is not None:
            files["chat_template"] = ("chat_template", read.chat_template.encode())
        if (card := read_card(read, limits)) is not None:
            files["card"] = ("card", card)
        data = {"examples": json.dumps(list(examples))} if examples else {}
        if description is not None:
            data["description"] = description
        with read.open_weights() as weights:
            files["weights"] = (WEIGHTS_FILE, weights)
            return self.call("PUT", name, headers, params=FULL, files=files, data=data)
