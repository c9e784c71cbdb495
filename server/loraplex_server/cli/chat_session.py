"""One conversation with a server over its HTTP API; knows nothing of terminals."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx

from .server_client import server_client, server_root

__all__ = ["AdapterLine", "ChatError", "ChatSession"]

_CONNECT_S = 5.0
_ANSWER_S = 300.0  # between two pieces of an answer: a full queue may hold it back


class ChatError(Exception):
    """Something that the person at the terminal can act on."""


@dataclass(frozen=True, slots=True)
class AdapterLine:
    name: str
    family: str
    ranks: tuple[int, ...]
    description: str | None


class ChatSession:
    """Keeps the turns of a conversation. Not thread-safe. Every method may raise ChatError."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        self._url = server_root(url)
        timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
        try:
            self._client = server_client(url, api_key, timeout)
        except httpx.InvalidURL as error:
            raise ChatError(f"{url} is no URL: {error}") from error
        self._system = system
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._model = ""
        self._adapter: object = None  # what a request's "adapter" field holds
        self._adapter_name: str | None = None
        self._turns: list[dict[str, str]] = []

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()

    @property
    def adapter_name(self) -> str | None:
        return self._adapter_name

    def connect(self) -> str:
        """The id of the server's base model."""
        models = self._get("/v1/models")["data"]
        if not models:
            raise ChatError(f"the server at {self._url} serves no model")
        self._model = models[0]["id"]
        return self._model

    def adapters(self) -> list[AdapterLine]:
        return [
            AdapterLine(
                card["name"],
                card.get("family", ""),
                tuple(card.get("ranks", ())),
                card.get("description"),
            )
            for card in self._get("/v1/adapters")["data"]
        ]

    def use(self, adapter: str | None) -> None:
        """Answer through ``adapter`` (None: the base) from now on, in a new conversation.

        A plain name must exist; other forms (``name@digest``, ``auto``, JSON) are checked by the
        server with the first question.
        """
        wanted: object = adapter
        if adapter == "":
            raise ChatError("the adapter's name is empty; without one the base answers")
        if adapter is not None and adapter[0] in "[{":
            try:
                wanted = json.loads(adapter)
            except ValueError as error:
                raise ChatError(f"{adapter} is not JSON: {error}") from error
        elif adapter is not None and adapter != "auto" and "@" not in adapter:
            self._get(f"/v1/adapters/{quote(adapter)}")
        self._adapter, self._adapter_name = wanted, adapter
        self.reset()

    def set_system(self, text: str | None) -> None:
        self._system = text
        self.reset()

    def reset(self) -> None:
        self._turns.clear()

    def ask(self, text: str) -> Generator[str, None, None]:
        """The pieces of the answer, as they come. A question that fails leaves no trace."""
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self._system}] if self._system else []
        body: dict[str, object] = {
            "model": self._model,
            "messages": [*system, *self._turns, question],
            "stream": True,
            "max_tokens": self._max_tokens,
            "temperature": self._temperature,
        }
        if self._adapter is not None:
            body["adapter"] = self._adapter
        answer = ""
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise ChatError(_problem(response))
                for event in _events(response):
                    if piece := _content(event):
                        answer += piece
                        yield piece
        except httpx.HTTPError as error:
            raise ChatError(self._unreachable(error)) from error
        finally:
            if answer:  # also when it was stopped half-way
                self._turns += [question, {"role": "assistant", "content": answer}]

    def _get(self, path: str) -> Any:
        try:
            response = self._client.get(path)
        except httpx.HTTPError as error:
            raise ChatError(self._unreachable(error)) from error
        if response.is_error:
            raise ChatError(_problem(response))
        try:
            return response.json()
        except ValueError as error:
            raise ChatError(f"what answers at {self._url} is no loraplex server") from error

    def _unreachable(self, error: httpx.HTTPError) -> str:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return f"no server answers at {self._url}; run `loraplex serve`, or give --url"
        return f"the connection to {self._url} broke: {error or type(error).__name__}"


def _events(response: httpx.Response) -> Generator[Mapping[str, Any], None, None]:
    for line in response.iter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise ChatError(str(event["error"].get("message", event["error"])))
        yield event


def _content(event: Mapping[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return choices[0].get("delta", {}).get("content") or ""


def _problem(response: httpx.Response) -> str:
    """The server's own words, if they are an OpenAI error object."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.request.url} answered {response.status_code}"
