"""`loraplex adapters --url`: the same commands against a running server."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

__all__ = ["RemoteAdapters"]

_TIMEOUT_S = 600.0


class RemoteAdapters:
    """Raises httpx.HTTPError with the server's own message."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def list(self) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self._call("GET", "")["data"]
        return data

    def show(self, name: str) -> dict[str, Any]:
        return self._call("GET", name, params={"report": "full"})

    def add(
        self,
        name: str,
        source: str,
        description: str | None,
        examples: tuple[str, ...],
        *,
        replace: bool,
    ) -> dict[str, Any]:
        from loraplex_adapter_store.companion_files import COMPANION_FILES  # imports torch

        headers = {} if replace else {"If-None-Match": "*"}
        folder = Path(source)
        if not folder.is_dir():
            body = {"source": source, "description": description, "examples": list(examples)}
            self._call("PUT", name, headers, json=body)
            return self.show(name)
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for part, file in (
                ("config", "adapter_config.json"),
                ("weights", "adapter_model.safetensors"),
                ("chat_template", "chat_template.jinja"),
                ("card", "card.json"),
                *((name, name) for name in COMPANION_FILES),
            ):
                if (folder / file).is_file():
                    files[part] = (file, stack.enter_context((folder / file).open("rb")))
            data = {"examples": json.dumps(list(examples))}
            if description is not None:
                data["description"] = description
            self._call("PUT", name, headers, files=files, data=data)
        return self.show(name)

    def remove(self, name: str) -> dict[str, Any]:
        return self._call("DELETE", name)

    def unload(self, name: str) -> dict[str, Any]:
        return self._call("POST", f"{name}/unload")

    def revisions(self, name: str) -> Sequence[dict[str, Any]]:
        data: Sequence[dict[str, Any]] = self._call("GET", f"{name}/revisions")["data"]
        return data

    def rollback(self, name: str, digest: str | None) -> dict[str, Any]:
        wanted = {} if digest is None else {"digest": digest}
        return self._call("POST", f"{name}/rollback", params={"report": "full", **wanted})

    def _call(
        self, method: str, name: str, headers: dict[str, str] | None = None, **body: Any
    ) -> dict[str, Any]:
        import httpx

        url = f"{self._url}/v1/adapters" + (f"/{quote(name)}" if name else "")
        answer = httpx.request(
            method, url, headers={**self._headers, **(headers or {})}, timeout=_TIMEOUT_S, **body
        )
        if answer.is_error:
            raise httpx.HTTPError(_message(answer.text))
        value: dict[str, Any] = answer.json()
        return value


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500] or "the server gave no reason"
