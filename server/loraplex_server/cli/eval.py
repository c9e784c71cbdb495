"""`loraplex eval`: the base and adapters of a running server, scored on the same chats."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .complete import complete_adapter

_TIMEOUT_S = 600.0


def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help='Chats that end with the expected answer, one a line ("messages"), or pairs of '
            '"prompt" and "answer".',
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            help="Adapter to score beside the base. Repeat the option for several.",
            autocompletion=complete_adapter,
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="exact, contains, json or rouge-l. auto: json if all expected answers are JSON "
            "objects or lists, else exact."
        ),
    ] = "auto",
    rows: Annotated[int | None, typer.Option(help="Take the first rows only.", min=1)] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)] = 256,
    page: Annotated[Path | None, typer.Option(help="HTML file for all answers.")] = None,
    url: Annotated[
        str, typer.Option(envvar="LORAPLEX_URL", help="URL of the server.")
    ] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAPLEX_API_KEY", help="API key of the server.")
    ] = None,
) -> None:
    """Score the base and adapters of a server on the same chats, with intervals.

    The gain of an adapter is the mean difference to the base over the rows.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from loraplex_server.evaluation.comparison import BASE, compare, read_rows
    from loraplex_server.evaluation.metrics import METRICS, fitting_metric
    from loraplex_server.evaluation.page import page_of, shown
    from loraplex_training.errors import ExamplesError

    from .failed import failed
    from .server_client import answer_of, errors_in_red, reached, server_client

    if metric not in ("auto", *METRICS):
        raise typer.BadParameter(
            f"{metric!r} is no metric; there are auto, {', '.join(METRICS)}", param_hint="--metric"
        )
    try:
        asked = read_rows(data, rows)
    except ExamplesError as error:
        raise failed(error) from None
    if metric == "auto":
        metric = fitting_metric([row.expected for row in asked])
    names = list(dict.fromkeys((BASE, *(adapter or ()))))
    progress = Progress(console=Console(stderr=True), transient=True)
    with errors_in_red(), reached(url), server_client(url, api_key, _TIMEOUT_S) as client, progress:
        model = answer_of(client.get("/v1/models"))["data"][0]["id"]
        bar = progress.add_task("answers", total=len(names) * len(asked))

        def ask(body: dict[str, object]) -> dict[str, Any]:
            chat = {"model": model, "max_tokens": max_tokens, **body}
            answer = answer_of(client.post("/v1/chat/completions", json=chat))
            progress.advance(bar)
            return answer

        arms = compare(ask, names, asked, METRICS[metric])
    table = Table("adapter", metric, "gain over base", "", box=None)
    for arm in arms:
        gain = "" if arm.gain is None else shown(arm.gain, signed=True)
        table.add_row(arm.name, shown(arm.mean), gain, arm.verdict)
    Console(markup=False, emoji=False).print(table)
    if page is not None:
        page.write_text(page_of(f"{data.name}: base and adapters", metric, asked, arms))
        typer.secho(f"all answers are in {page}", dim=True)
