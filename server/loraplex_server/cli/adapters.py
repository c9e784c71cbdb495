"""`loraplex adapters`: the adapters of a running server, or of a store on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .adapters_routing import routing
from .complete import complete_adapter

if TYPE_CHECKING:
    from loraplex_adapter_store.inspection import ModuleInspection

    from .adapters_local import LocalAdapters
    from .adapters_remote import RemoteAdapters

__all__ = ["adapters"]

_WIDE = 110  # columns of a terminal that has room for digests
_LEAST_DESCRIPTION = 8

adapters = typer.Typer(
    name="adapters", help="Add, list, look into and remove adapters.", no_args_is_help=True
)

adapters.command()(routing)

Url = Annotated[
    str | None,
    typer.Option(
        help="A server, as http://127.0.0.1:8000. Default: the one that runs on this machine.",
        envvar="LORAPLEX_URL",
    ),
]
Key = Annotated[
    str | None, typer.Option(help="Its API key.", envvar="LORAPLEX_API_KEY", show_default=False)
]
Model = Annotated[
    str | None, typer.Option(help="Base of the store on disk. Default: the default base.")
]
State = Annotated[Path | None, typer.Option(help="The store on disk. Default: that of the base.")]
Name = Annotated[str, typer.Argument(help="Name of the adapter.", autocompletion=complete_adapter)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@adapters.command("list")
def list_adapters(
    url: Url = None,
    api_key: Key = None,
    model: Model = None,
    state_dir: State = None,
    as_json: AsJson = False,
) -> None:
    """All adapters, one a line."""
    with _errors():
        cards = _backend(url, api_key, model, state_dir).list()
    if as_json:
        typer.echo(json.dumps(cards, indent=2))
        return
    from rich.console import Console

    for line in _listing(cards, Console().width):
        typer.echo(line)


@adapters.command()
def show(
    name: Name,
    url: Url = None,
    api_key: Key = None,
    model: Model = None,
    state_dir: State = None,
    as_json: AsJson = False,
) -> None:
    """One adapter with its load report."""
    with _errors():
        card = _backend(url, api_key, model, state_dir).show(name)
    if as_json:
        typer.echo(json.dumps(card, indent=2))
    else:
        _print_card(card)


@adapters.command()
def add(
    name: Annotated[str, typer.Argument(help="Name that requests will use.")],
    source: Annotated[
        str,
        typer.Argument(help="Folder, or hf://org/repo/sub@rev, s3://, gs://, az://, https://."),
    ],
    description: Annotated[str | None, typer.Option(help="What it is good at.")] = None,
    example: Annotated[list[str] | None, typer.Option(help="A prompt for it; repeatable.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace/--no-replace", help="Take the name over if it exists.")
    ] = True,
    url: Url = None,
    api_key: Key = None,
    model: Model = None,
    state_dir: State = None,
    as_json: AsJson = False,
) -> None:
    """Check an adapter and store it; refused with reasons if any part would not be served."""
    with _errors():
        backend = _backend(url, api_key, model, state_dir)
        card = backend.add(name, source, description, tuple(example or ()), replace=replace)
    if as_json:
        typer.echo(json.dumps(card, indent=2))
    else:
        _print_card(card)


@adapters.command("rm")
def remove(
    name: Name,
    url: Url = None,
    api_key: Key = None,
    model: Model = None,
    state_dir: State = None,
) -> None:
    """Remove a name; waits for running requests and says how many bytes were freed."""
    with _errors():
        report = _backend(url, api_key, model, state_dir).remove(name)
    freed = ", ".join(f"{tier} {_size(n)}" for tier, n in report["n_bytes_freed"].items())
    typer.echo(f"removed {name} (freed: {freed})")


@adapters.command()
def unload(name: Name, url: Url = None, api_key: Key = None, model: Model = None) -> None:
    """Free an idle adapter's memory on a running server; the next request loads it again."""
    with _errors():
        found = _server_url(url, model, None)
        if found is None:
            raise typer.BadParameter("no server runs on this machine; name one with --url")
        card = _remote(found, api_key).unload(name)
    typer.echo(f"{name} is on {card['tier']}, and is loaded again when it is asked for")


@adapters.command()
def revisions(
    name: Name,
    url: Url = None,
    api_key: Key = None,
    model: Model = None,
    state_dir: State = None,
    as_json: AsJson = False,
) -> None:
    """The contents a name can be asked for or rolled back to: the current one first."""
    with _errors():
        found = _backend(url, api_key, model, state_dir).revisions(name)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for revision in found:
        mark = "current" if revision is found[0] else ""
        when = datetime.fromtimestamp(revision["created"]).isoformat(" ", "seconds")
        typer.echo(f"{revision['revision']:5}  {revision['digest'][:12]}  {when}  {mark}".rstrip())


@adapters.command()
def rollback(
    name: Name,
    digest: Annotated[
        str | None,
        typer.Option(help="Beginning of the digest to go to. Default: the content before."),
    ] = None,
    url: Url = None,
    api_key: Key = None,
    model: Model = None,
    state_dir: State = None,
) -> None:
    """Make an older content current again; running requests finish on what they have."""
    with _errors():
        card = _backend(url, api_key, model, state_dir).rollback(name, digest)
    typer.echo(f"{name} is {card['digest'][:12]} again (revision {card['revision']})")


@adapters.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Folder with a .bin, or an adapter.")],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    initial: Annotated[
        Path | None,
        typer.Option(help="The adapter as saved before training (PiSSA, LoRA-GA, CorDA)."),
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="ABMLL: write so many posterior draws instead.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Turn a pickle into safetensors, in a locked-down process, or add initial factors."""
    from loraplex_adapter_store.convert import convert_directory, draw_posterior
    from loraplex_adapter_store.limits import StoreLimits

    with _errors():
        if draws is not None:
            for folder in draw_posterior(source, out, draws, seed, StoreLimits()):
                typer.echo(f"wrote {folder}")
            return
        done = convert_directory(source, out, StoreLimits(), initial=initial)
    for step in done.steps:
        typer.echo(step)
    for name in done.dropped:
        typer.echo(f"dropped {name}: not a tensor")
    typer.echo(f"wrote {out} ({len(done.tensors)} tensors)")


@adapters.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Folder of an adapter, or a name in the store.")],
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Count intruder dimensions (an SVD per module).")
    ] = False,
    k: Annotated[int, typer.Option(help="Top singular vectors looked at.", min=1)] = 10,
    epsilon: Annotated[float, typer.Option(help="Cosine below which one is an intruder.")] = 0.5,
    plot: Annotated[
        Path | None, typer.Option(help="Write the spectra as a picture (needs matplotlib).")
    ] = None,
    model: Model = None,
    state_dir: State = None,
    as_json: AsJson = False,
) -> None:
    """What an adapter does to each module: ranks, ‖ΔW‖/‖W‖, spectra, intruder dimensions."""
    from loraplex_adapter_store.inspection import inspect_plan

    with _errors():
        local = _local(model, state_dir)
        plan, report = local.read(source)
        found = inspect_plan(plan, local.base, intruders=intruders, k=k, epsilon=epsilon)
    if plot is not None:
        _plot(found, plot)
    if as_json:
        rows = [module.to_json() for module in found]
        typer.echo(json.dumps({"report": report, "modules": rows}, indent=2))
        return
    _print_inspection(report, found)


def _backend(
    url: str | None, api_key: str | None, model: str | None, state_dir: Path | None
) -> RemoteAdapters | LocalAdapters:
    """The server that is named, else the one that runs on this machine, else the store on disk."""
    found = _server_url(url, model, state_dir)
    return _remote(found, api_key) if found else _local(model, state_dir)


def _server_url(url: str | None, model: str | None, state_dir: Path | None) -> str | None:
    """Of the server that is named, else of the one that runs on this machine."""
    if url:
        if model is not None or state_dir is not None:
            raise typer.BadParameter(
                "--model and --state-dir are for this machine, and --url or LORAPLEX_URL names a "
                "server: leave out the options, or the URL"
            )
        return url
    from loraplex_server.model.pull import loraplex_home
    from loraplex_server.running_servers import running_servers

    found = [
        server
        for server in running_servers(loraplex_home())
        if (model is None or Path(model).name == Path(server.model).name)
        and (state_dir is None or state_dir.resolve() == Path(server.store).resolve())
    ]
    if not found:
        return None
    if len(found) > 1:
        urls = ", ".join(server.url for server in found)
        raise typer.BadParameter(f"several servers run here; choose one with --url: {urls}")
    typer.secho(f"using the server at {found[0].url}", dim=True, err=True)
    return found[0].url


def _remote(url: str, api_key: str | None) -> RemoteAdapters:
    from .adapters_remote import RemoteAdapters

    return RemoteAdapters(url, api_key)


def _local(model: str | None, state_dir: Path | None) -> LocalAdapters:
    from .adapters_local import LocalAdapters

    return LocalAdapters(model, state_dir)


class _errors:  # noqa: N801  reads as a statement
    """Known failures are one line in red, not a traceback."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        import httpx

        from loraplex_adapter_store.errors import StoreError
        from loraplex_server.model.errors import ModelError

        if isinstance(error, StoreError | ModelError | httpx.HTTPError | httpx.InvalidURL):
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None


def _print_card(card: dict[str, Any]) -> None:
    report = card["report"]
    ratios = [m["delta_ratio"] for m in report["modules"].values() if m["delta_ratio"] is not None]
    lines = {
        "name": f"{card['name']} (revision {card['revision']})",
        "digest": card["digest"],
        "family": f"{card['family']}, ranks {', '.join(map(str, card['ranks'])) or 'none'}",
        "scale": report["scale_rule"],
        "tensors": f"{report['n_matched']} matched, {len(report['unexpected_keys'])} unexpected",
        "modules": f"{len(report['modules'])}",
        "‖ΔW‖/‖W‖": f"{min(ratios):.4f} … {max(ratios):.4f}" if ratios else "–",
        "bytes": ", ".join(f"{tier} {_size(n)}" for tier, n in card["n_bytes"].items() if n),
        "description": card["description"] or "–",
    }
    for key, value in lines.items():
        typer.echo(f"{key:12} {value}")
    for note in report["notes"]:
        typer.echo(f"note         {note}")
    for warning in report["warnings"]:
        typer.secho(f"warning      {warning}", fg="yellow")


def _print_inspection(report: dict[str, Any], found: tuple[ModuleInspection, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{report['family']}, {report['scale_rule']}, digest {report['digest'][:12]}")
    table = Table("module", "rank", "effective", "‖ΔW‖/‖W‖", "spectrum", "intruders", box=None)
    for module in found:
        table.add_row(
            module.module,
            str(module.rank),
            f"{module.effective_rank:.1f}",
            f"{module.delta_ratio:.4f}",
            spark(module.singular_values),
            "" if module.n_intruders is None else str(module.n_intruders),
        )
    console.print(table)
    if found and found[0].n_intruders is not None:
        total = sum(module.n_intruders or 0 for module in found)
        console.print(f"intruder dimensions: {total} in {len(found)} modules")


def spark(values: tuple[float, ...], width: int = 24) -> str:
    """A line of blocks, tallest for the largest value: the spectrum at a glance."""
    if not values or values[0] <= 0:
        return ""
    step = max(1, len(values) // width)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[min(7, int(8 * value / values[0]))] for value in values[::step][:width])


def _plot(found: tuple[ModuleInspection, ...], target: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        typer.secho(
            "error: --plot needs matplotlib: pip install 'loraplex[load]'", fg="red", err=True
        )
        raise typer.Exit(1) from None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    kinds = sorted({module.module.rpartition(".")[2] for module in found})
    for module in found:
        kind = module.module.rpartition(".")[2]
        color = f"C{kinds.index(kind) % 10}"
        axes.plot(range(1, module.rank + 1), module.singular_values, color=color, alpha=0.4)
    for number, kind in enumerate(kinds):
        axes.plot([], [], color=f"C{number % 10}", label=kind)
    axes.set(xlabel="index", ylabel="singular value of ΔW", yscale="log")
    axes.legend()
    figure.savefig(target)
    typer.echo(f"wrote {target}")


def _listing(cards: Sequence[dict[str, Any]], width: int) -> list[str]:
    """A table whose lines fit ``width``: names stay whole, descriptions are cut."""
    titles = ("name", "family", "ranks", "disk", "tier", "rev", "digest")
    rows: list[tuple[str, ...]] = [titles]
    for card in cards:
        rows.append(
            (
                card["name"],
                card["family"],
                _ranks(card["ranks"]),
                _size(card["n_bytes"]["disk"]),
                card.get("tier", "disk") or "–",  # not told of what the operator shares
                str(card["revision"]),
                card["digest"][:12],
            )
        )
    if width < _WIDE:
        rows = [row[:-1] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = width - sum(widths) - 2 * len(widths)
    descriptions = ["description", *(card["description"] or "" for card in cards)]
    lines = []
    for row, description in zip(rows, descriptions, strict=True):
        cells = [cell.ljust(size) for cell, size in zip(row, widths, strict=True)]
        if room >= _LEAST_DESCRIPTION:
            short = description if len(description) <= room else f"{description[: room - 1]}…"
            cells.append(short)
        lines.append("  ".join(cells).rstrip())
    return lines


def _ranks(ranks: list[int]) -> str:
    """ "8", or the smallest and largest of many."""
    return ",".join(map(str, ranks)) if len(ranks) <= 2 else f"{ranks[0]}–{ranks[-1]}"


def _size(n_bytes: int) -> str:
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
