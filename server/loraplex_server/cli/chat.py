"""`loraplex chat`: a chat with a running server in the terminal, with any of its adapters."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from .complete import complete_adapter

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 5.0
_ANSWER_S = 300.0  # between two pieces of an answer, which may wait in a queue
_HELP = """\
/adapter NAME   answer through this adapter (also NAME@digest, auto, or JSON); starts afresh
/adapter        answer through the base alone; starts afresh
/adapters       the adapters of the server
/system TEXT    set the system prompt (without TEXT: the model's own); starts afresh
/reset          forget the conversation
/help           this text
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""


def chat(
    url: Annotated[
        str, typer.Option(envvar="LORAPLEX_URL", help="URL of the server.")
    ] = "http://127.0.0.1:8000",
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", "-a", help="Adapter that answers first.", autocompletion=complete_adapter
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of the chat.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAPLEX_API_KEY", help="API key of the server.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature. 0 takes the most likely token.", min=0)
    ] = 0.0,
) -> None:
    """Chat in the terminal. /adapter NAME switches adapters, /help lists all commands.

    Lines can also be piped in: `echo "Tell me about Oslo." | loraplex chat --adapter pirate`.
    """
    import httpx

    from .server_client import errors_in_red, reached, server_client

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    timeout = httpx.Timeout(_ANSWER_S, connect=_CONNECT_S)
    with errors_in_red(), reached(url), server_client(url, api_key, timeout) as client:
        session = ChatSession(client, system=system, max_tokens=max_tokens, temperature=temperature)
        if adapter is not None:
            session.use(adapter)
        hint = f"{session.model} at {url} · /adapters lists, /help helps, Ctrl-D leaves"
        typer.secho(hint, dim=True)
        has_failed = _loop(session)
    if has_failed and not sys.stdin.isatty():
        raise typer.Exit(1)


class ChatSession:
    """The turns of a conversation. Not thread-safe. Every method may raise Refused."""

    def __init__(
        self,
        client: httpx.Client,
        *,
        system: str | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        self._client = client
        self.system = system
        self._options = {"max_tokens": max_tokens, "temperature": temperature}
        self._adapter: dict[str, object] = {}  # field "adapter" of requests
        self.adapter_name: str | None = None
        self._turns: list[dict[str, str]] = []
        models = self.get("/v1/models")["data"]
        self.model = models[0]["id"] if models else ""

    def get(self, path: str) -> dict[str, Any]:
        from .server_client import answer_of, reached

        with reached(str(self._client.base_url)):
            return answer_of(self._client.get(path))

    def use(self, adapter: str | None) -> None:
        """Start a new conversation with ``adapter``; None is the base.

        A plain name must exist. The server checks other forms (``name@digest``, ``auto``, JSON)
        with the first question.
        """
        from .server_client import Refused

        selector: object = adapter
        if adapter == "":
            raise Refused("the adapter's name is empty; without one the base answers", None)
        if adapter is not None and adapter[0] in "[{":
            try:
                selector = json.loads(adapter)
            except ValueError as error:
                raise Refused(f"{adapter} is not JSON: {error}", None) from error
        elif adapter is not None and adapter != "auto" and "@" not in adapter:
            self.get(f"/v1/adapters/{quote(adapter)}")
        self._adapter = {} if adapter is None else {"adapter": selector}
        self.adapter_name = adapter
        self.reset()

    def reset(self) -> None:
        self._turns.clear()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the pieces of the answer. A failed question does not enter the history."""
        from .server_client import answer_of, reached

        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self._turns, question]
        body = {"model": self.model, "messages": messages, "stream": True}
        stream = self._client.stream(
            "POST", "/v1/chat/completions", json={**body, **self._options, **self._adapter}
        )
        answer = ""
        try:
            with reached(str(self._client.base_url)), stream as response:
                if response.is_error:
                    response.read()
                    answer_of(response)  # raises Refused
                for piece in _pieces(response):
                    answer += piece
                    yield piece
        finally:
            if answer:  # also if the answer was stopped
                self._turns += [question, {"role": "assistant", "content": answer}]


def _pieces(response: httpx.Response) -> Generator[str, None, None]:
    """Yield the texts of the stream's events. Raises Refused for an error event."""
    from .server_client import Refused

    for line in response.iter_lines():
        if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise Refused(str(event["error"].get("message", event["error"])), None)
        for choice in event.get("choices", ()):
            if piece := choice.get("delta", {}).get("content"):
                yield piece


def _loop(session: ChatSession) -> bool:
    """Answer lines until the end of input or /quit. Return True if a line failed."""
    from .server_client import Refused

    has_failed = False
    while True:
        prompt = f"{session.adapter_name or 'base'}> " if sys.stdin.isatty() else ""
        try:
            line = input(prompt).strip()
        except EOFError:
            return has_failed
        except KeyboardInterrupt:
            typer.echo()
            continue
        if line == "/quit":
            return has_failed
        try:
            if line.startswith("/"):
                _command(session, line)
            elif line:
                _answer(session, line)
        except Refused as error:
            has_failed = True
            typer.secho(f"error: {error}", fg="red", err=True)


def _command(session: ChatSession, line: str) -> None:
    name, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    if name == "adapter":
        session.use(argument or None)
        typer.secho(f"answers come from {session.adapter_name or 'the base'} now", dim=True)
    elif name == "adapters":
        _show_adapters(session.get("/v1/adapters")["data"])
    elif name == "system":
        session.system = argument or None
        session.reset()
        typer.secho("system prompt set" if argument else "system prompt removed", dim=True)
    elif name == "reset":
        session.reset()
        typer.secho("forgotten", dim=True)
    elif name == "help":
        typer.echo(_HELP)
    else:
        typer.secho(f"/{name} is no command; /help lists them", fg="yellow", err=True)


def _show_adapters(cards: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    if not cards:
        typer.secho("the server has no adapters", dim=True)
        return
    table = Table("adapter", "family", "ranks", "what it does", box=None)
    for card in cards:
        ranks = ", ".join(map(str, card.get("ranks", ())))
        table.add_row(card["name"], card.get("family", ""), ranks, card.get("description") or "")
    Console(markup=False, emoji=False).print(table)


def _answer(session: ChatSession, text: str) -> None:
    pieces = session.ask(text)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        pieces.close()  # closes the stream, so the server cancels the request
        typer.secho(" [stopped]", dim=True, nl=False)
    typer.echo()
