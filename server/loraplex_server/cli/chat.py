"""`loraplex chat`: talk to a running server in the terminal, through any of its adapters."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from .complete import complete_adapter

if TYPE_CHECKING:
    from .chat_session import ChatSession

__all__ = ["chat"]

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
        str, typer.Option(envvar="LORAPLEX_URL", help="Where the server is.")
    ] = "http://127.0.0.1:8000",
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", "-a", help="Begin with this adapter.", autocompletion=complete_adapter
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAPLEX_API_KEY", help="If the server wants one.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
) -> None:
    """Chat in the terminal, streaming; /adapter NAME switches adapters, /help lists the rest.

    Lines can also be piped in: `echo "Tell me about Oslo." | loraplex chat --adapter pirate`.
    """
    from .chat_session import ChatError, ChatSession

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history in input())
    try:
        with ChatSession(
            url, api_key=api_key, system=system, max_tokens=max_tokens, temperature=temperature
        ) as session:
            model = session.connect()
            if adapter is not None:
                session.use(adapter)
            typer.secho(f"{model} at {url} · /adapters lists, /help helps, Ctrl-D leaves", dim=True)
            failed = _loop(session)
    except ChatError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    if failed and not _is_terminal():
        raise typer.Exit(1)


def _loop(session: ChatSession) -> bool:
    """Until the end of input or /quit. True if anything failed."""
    from .chat_session import ChatError

    failed = False
    while True:
        try:
            line = input(f"{session.adapter_name or 'base'}> " if _is_terminal() else "").strip()
        except EOFError:
            return failed
        except KeyboardInterrupt:
            typer.echo()
            continue
        if line == "/quit":
            return failed
        try:
            if line.startswith("/"):
                _command(session, line)
            elif line:
                _answer(session, line)
        except ChatError as error:
            failed = True
            typer.secho(f"error: {error}", fg="red", err=True)


def _command(session: ChatSession, line: str) -> None:
    name, _, argument = line[1:].partition(" ")
    argument = argument.strip()
    if name == "adapter":
        session.use(argument or None)
        typer.secho(f"answers come from {session.adapter_name or 'the base'} now", dim=True)
    elif name == "adapters":
        _show_adapters(session)
    elif name == "system":
        session.set_system(argument or None)
        typer.secho("system prompt set" if argument else "system prompt removed", dim=True)
    elif name == "reset":
        session.reset()
        typer.secho("forgotten", dim=True)
    elif name == "help":
        typer.echo(_HELP)
    else:
        typer.secho(f"/{name} is no command; /help lists them", fg="yellow", err=True)


def _show_adapters(session: ChatSession) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("adapter", "family", "ranks", "what it does", box=None)
    cards = session.adapters()
    for card in cards:
        ranks = ", ".join(str(rank) for rank in card.ranks)
        table.add_row(card.name, card.family, ranks, card.description or "")
    if cards:
        Console(markup=False, emoji=False).print(table)
    else:
        typer.secho("the server has no adapters", dim=True)


def _answer(session: ChatSession, text: str) -> None:
    pieces = session.ask(text)
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        pieces.close()  # leaves the stream: the server frees what the request held
        typer.secho(" [stopped]", dim=True, nl=False)
    typer.echo()


def _is_terminal() -> bool:
    import sys

    return sys.stdin.isatty()
