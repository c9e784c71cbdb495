"""`loraplex generate`: an adapter from a sentence, here or on a server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loraplex_generation.chat_base import ChatBase
    from loraplex_generation.service import GeneratedAdapter, Generator

__all__ = ["generate"]


def generate(
    description: Annotated[str, typer.Argument(help="What the adapter should do, in a sentence.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Try it on this input; repeat.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto, text-map, end-to-end, sg-lora, icm-lora ...")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the draws.", min=0)] = 0,
    samples: Annotated[int, typer.Option(help="Latent draws to average.", min=0, max=16)] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Also for a description unlike any known task.")
    ] = False,
    wording: Annotated[
        list[str] | None, typer.Option(help="The same task in other words; repeat.")
    ] = None,
    prompts_from: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled inputs of the task, one a line, 8 or more; for icm-lora.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(
            help='Learn from these, 2 to 64 lines of {"prompt": "...", "answer": "..."}; '
            "half a minute.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Seconds to learn from the examples for.", min=1, max=3600)
    ] = 30.0,
    out: Annotated[
        Path | None, typer.Option(help="Write a PEFT directory here.", file_okay=False)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder of an adapter in --out.")
    ] = False,
    server: Annotated[
        str | None, typer.Option(help="Generate and register on this server, as http://host:8000.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name on the server.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAPLEX_API_KEY", help="For the server.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model; default: the pulled one.")] = None,
) -> None:
    """Make a LoRA from a description, show where it came from, and try it."""
    from loraplex_adapter_store.errors import StoreError
    from loraplex_server.model.errors import ModelError

    _check_place(server, name, out, base)
    if out is not None:
        _check_out(out, overwrite)
    unlabelled = [] if prompts_from is None else prompts_from.read_text().splitlines()
    unlabelled = [line for line in unlabelled if line.strip()]
    order = _Order(description, wording or [], unlabelled, method, seed, samples, force)
    try:
        if server is not None:
            learning = {} if examples is None else _learning(examples, budget)
            _on_server(
                server, api_key, {**asdict(order), **learning, "name": name}, prompt or [], budget
            )
        elif examples is not None:
            _learn(order, examples, budget, base, out, prompt or [])
        else:
            _here(order, base, out, prompt or [])
    except (StoreError, ModelError, OSError, _ServerSaysNo) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(1) from None


def _check_place(server: str | None, name: str | None, out: Path | None, base: str | None) -> None:
    """Options that would go unheard are refused."""
    if server is None and name is not None:
        raise typer.BadParameter(
            "--name is for a server: add --server URL, or write a folder with --out instead"
        )
    if server is not None and out is not None:
        raise typer.BadParameter(
            "--out writes a folder here, and with --server the server keeps the adapter: leave out "
            "--server, or give --name instead of --out"
        )
    if server is not None and base is not None:
        raise typer.BadParameter(
            "--base is for adapters that are made here, and a server uses its own: leave out --base"
        )


def _check_out(out: Path, overwrite: bool) -> None:
    """Before anything is generated: only an adapter is replaced, and only by --overwrite."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "adapter_config.json").exists():
        raise typer.BadParameter(f"{out} holds files that are no adapter; choose a new folder")
    if not overwrite:
        raise typer.BadParameter(f"{out} holds an adapter already; give --overwrite to replace")


class _ServerSaysNo(Exception):
    pass


@dataclass(frozen=True)
class _Order:
    """What `Generator.generate` and `POST /v1/adapters/generate` take, by the same names."""

    description: str
    wordings: list[str]
    prompts: list[str]
    method: str
    seed: int
    samples: int
    force: bool


def _here(order: _Order, base: str | None, out: Path | None, prompts: list[str]) -> None:
    from loraplex_generation.chat_base import ChatBase

    directory, generator = _generator(base)
    made = generator.generate(**asdict(order))
    _show(made, out)
    if prompts:
        _try(made, ChatBase.of_directory(directory), prompts)


def _learn(
    order: _Order,
    examples: Path,
    budget_s: float,
    base: str | None,
    out: Path | None,
    prompts: list[str],
) -> None:
    import time

    from rich.progress import Progress

    from loraplex_generation.chat_base import ChatBase
    from loraplex_generation.from_examples import generate_from_examples, read_pairs

    pairs = read_pairs(examples)
    directory, generator = _generator(base)
    model = ChatBase.of_directory(directory)
    with Progress(transient=True) as progress:
        task = progress.add_task("learning", total=1.0)
        made = generate_from_examples(
            generator,
            *model,
            order.description,
            pairs,
            wordings=order.wordings,
            unlabelled=order.prompts,
            method=order.method,
            seed=order.seed,
            samples=order.samples,
            force=order.force,
            deadline=time.monotonic() + budget_s,
            report=lambda now: progress.update(task, completed=now.step / now.n_steps),
        )
    _show(made, out)
    _try(made, model, prompts)


def _learning(examples: Path, budget_s: float) -> dict[str, object]:
    """What `POST /v1/adapters/generate` takes besides."""
    from loraplex_generation.from_examples import read_pairs

    pairs = [asdict(pair) for pair in read_pairs(examples)]
    return {"examples": pairs, "budget_s": budget_s, "wait": True}


def _generator(base: str | None) -> tuple[Path, Generator]:
    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_generation.service import Generator
    from loraplex_generation.shipped import shipped_folder
    from loraplex_server.model.pull import DEFAULT_BASE, resolve_encoder, resolve_model

    directory = resolve_model(base)
    return directory, Generator.load(
        shipped_folder(),
        SentenceEncoder(resolve_encoder()),
        base_name=base or DEFAULT_BASE,
        base_directory=directory,
    )


def _show(made: GeneratedAdapter, out: Path | None) -> None:
    _show_card(made.card)
    if out is not None:
        _write(made, out)
        typer.echo(f"wrote {out}")


def _try(made: GeneratedAdapter, model: ChatBase, prompts: list[str]) -> None:
    from loraplex_generation.decoding import greedy_reply

    for prompt in prompts:
        typer.echo(f"{prompt}  →  {greedy_reply(*model, prompt, made.layout, made.vector)}")


def _write(made: GeneratedAdapter, out: Path) -> None:
    """Written beside ``out`` and renamed, so that Ctrl-C leaves no half of it."""
    import json
    from tempfile import TemporaryDirectory

    from safetensors.torch import save_file

    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        fresh = Path(beside, "new")
        fresh.mkdir()
        (fresh / "adapter_config.json").write_text(json.dumps(made.config, indent=1) + "\n")
        (fresh / "loraplex_card.json").write_text(json.dumps(made.card, indent=1) + "\n")
        save_file(made.tensors, fresh / "adapter_model.safetensors")
        if out.exists():
            out.rename(Path(beside, "old"))
        fresh.rename(out)


def _on_server(
    server: str,
    api_key: str | None,
    order: dict[str, object],
    prompts: list[str],
    budget_s: float,
) -> None:
    import httpx

    from .server_client import Refused, server_client

    timeout_s = 120 + 5 * budget_s  # others may be learning before
    try:
        with server_client(server, api_key, timeout_s) as client:
            card = _ask(client, "/v1/adapters/generate", order)
            provenance = card["provenance"]
            assert isinstance(provenance, dict)
            _show_card(provenance)
            typer.echo(f"registered as {card['name']}")
            for prompt in prompts:
                body: dict[str, object] = {
                    "model": card["name"],
                    "messages": [{"role": "user", "content": prompt}],
                    "temperature": 0,
                    "max_tokens": 64,
                }
                reply = _ask(client, "/v1/chat/completions", body)
                choices = reply["choices"]
                assert isinstance(choices, list)
                typer.echo(f"{prompt}  →  {choices[0]['message']['content']}")
    except Refused as error:
        raise _ServerSaysNo(str(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _ServerSaysNo(f"{server}: {error}; is `loraplex serve` running there?") from error


def _ask(client: object, path: str, body: dict[str, object]) -> dict[str, object]:
    import httpx

    from .server_client import answer_of

    assert isinstance(client, httpx.Client)
    return answer_of(client.post(path, json={k: v for k, v in body.items() if v is not None}))


def _what_came(learned: dict[str, object]) -> str:
    if learned["gained"]:
        told = f": {learned['start']!r} gets every pair right, so nothing was trained"
        return "" if learned["steps"] else told
    if learned.get("start_is_right"):
        return ": the draft gets every pair right, so nothing was trained"
    return ": nothing gained, so nothing was changed"


def _show_card(card: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    parts = card.get("parts", {})
    assert isinstance(parts, dict)
    rows = {
        "method": card["method"],
        "made of": " ".join(f"{weight:+.2f}·{part}" for part, weight in parts.items()),
        "ood_score": f"{card['ood_score']} (limit {card['ood_limit']})",
        "‖ΔW‖": card["delta_norm"],
        "took": f"{card['milliseconds']} ms",
    }
    learned = card.get("refinement")
    if isinstance(learned, dict) and learned["finished"]:
        held_out = learned["held_out"]
        before, after = held_out["before"], held_out["after"]
        rows["examples"] = (
            f"{card['examples']}; of {before['of']} held out {before['exact']} → {after['exact']} "
            f"exact, nll {before['nll']:.2f} → {after['nll']:.2f}"
            + _what_came(learned)
            + ("; time ran out, --budget gives more" if learned.get("timed_out") else "")
        )
        if turns := held_out.get("turns"):
            rows["as turns"] = (
                f"{turns['exact']} of {turns['of']} exact, nll {turns['nll']:.2f}: the base with "
                "the others as turns of a chat"
            )
    for label, value in rows.items():
        table.add_row(label, str(value))
    Console().print(table)
