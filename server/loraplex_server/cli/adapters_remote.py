"""`loraplex adapters --url`: the same commands against a running server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loraplex_adapter_store.content_files import CONFIG_FILE, WEIGHTS_FILE
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.sources.local import read_card, read_directory

from .server_client import Refused, answer_of, server_client

__all__ = ["RemoteAdapters"]

_TIMEOUT_S = 600.0
_WHOLE = {"report": "full"}  # cards as the store on disk gives them


class RemoteAdapters:
    """Raises httpx.HTTPError with the server's own message."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url
        self._api_key = api_key

    def list(self) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self._call("GET", "")["data"]
        return data

    def show(self, name: str) -> dict[str, Any]:
        return self._call("GET", name, params=_WHOLE)

    def add(
        self,
        name: str,
        source: str,
        description: str | None,
        examples: tuple[str, ...],
        *,
        replace: bool,
    ) -> dict[str, Any]:
        """A folder of this machine is uploaded; anything else the server fetches itself.

        Raises StoreError for a folder that holds no adapter.
        """
        headers = {} if replace else {"If-None-Match": "*"}
        if Path(source).is_dir():
            return self._upload(name, Path(source).resolve(), description, examples, headers)
        told = {"description": description, "examples": examples}
        body = {"source": source, **told, "wait": True}
        try:
            return self._call("PUT", name, headers, params=_WHOLE, json=body)
        except Refused as error:
            if "://" in source or error.code not in ("source_forbidden", "source_not_found"):
                raise
            message = f"there is no folder {source!r} on this machine, and the server says: {error}"
            raise Refused(message, error.code) from None

    def remove(self, name: str) -> dict[str, Any]:
        return self._call("DELETE", name)

    def unload(self, name: str) -> dict[str, Any]:
        return self._call("POST", f"{name}/unload")

    def revisions(self, name: str) -> Sequence[dict[str, Any]]:
        data: Sequence[dict[str, Any]] = self._call("GET", f"{name}/revisions")["data"]
        return data

    def rollback(self, name: str, digest: str | None) -> dict[str, Any]:
        wanted = {} if digest is None else {"digest": digest}
        return self._call("POST", f"{name}/rollback", params={**_WHOLE, **wanted})

    def _upload(
        self,
        name: str,
        folder: Path,
        description: str | None,
        examples: tuple[str, ...],
        headers: dict[str, str],
    ) -> dict[str, Any]:
        """What the store on disk would read of the folder."""
        limits = StoreLimits()
        read = read_directory(folder, limits)
        files: dict[str, Any] = {"config": (CONFIG_FILE, read.config)}
        files |= {part: (part, data) for part, data in read.companions.items()}
        if read.chat_template is not None:
            files["chat_template"] = ("chat_template", read.chat_template.encode())
        if (card := read_card(read, limits)) is not None:
            files["card"] = ("card", card)
        data = {"examples": json.dumps(examples)} if examples else {}
        if description is not None:
            data["description"] = description
        with read.open_weights() as weights:
            files["weights"] = (WEIGHTS_FILE, weights)
            return self._call("PUT", name, headers, params=_WHOLE, files=files, data=data)

    def _call(
        self, method: str, name: str, headers: dict[str, str] | None = None, **body: Any
    ) -> dict[str, Any]:
        path = "/v1/adapters" + (f"/{quote(name)}" if name else "")
        with server_client(self._url, self._api_key, _TIMEOUT_S) as client:
            return answer_of(client.request(method, path, headers=headers, **body))
