"""`loraplex generate`: an adapter from a sentence, here or on a server."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .option_groups import flag, grouped

if TYPE_CHECKING:
    from loraplex_generation.generated import GeneratedAdapter
    from loraplex_generation.request import AdapterGenerationRequest


@dataclass(frozen=True)
class _MethodOptions:
    method: str = flag(
        "auto",
        "The method: auto, multi-task, or on a server sg-lora or icm-lora, which mix its adapters.",
    )
    seed: int = flag(0, "The seed of the draws.", min=0)
    samples: int = flag(0, "The number of latent draws to average.", min=0, max=16)
    force: bool = flag(False, "Generate even if the description fits no known task.", "--force")
    wording: list[str] | None = flag(None, "Another sentence for the same task. Can be repeated.")
    prompts_from: Path | None = flag(
        None,
        "File with 8 or more unlabelled inputs of the task, one per line, for icm-lora.",
        exists=True,
        dir_okay=False,
    )


@dataclass(frozen=True)
class _ExampleOptions:
    examples: Path | None = flag(
        None,
        'A file of 2 to 64 lines {"prompt": "...", "answer": "..."} to learn from.',
        exists=True,
        dir_okay=False,
    )
    budget: float = flag(30.0, "Seconds to learn from examples.", min=1, max=3600)


@dataclass(frozen=True)
class _PlaceOptions:
    out: Path | None = flag(None, "Write a PEFT directory here.", file_okay=False)
    overwrite: bool = flag(False, "Replace an adapter in --out.", "--overwrite")
    server: str | None = flag(
        None, "Generate and register on this server, such as http://host:8000."
    )
    name: str | None = flag(None, "The adapter's name on the server.")
    api_key: str | None = flag(None, "The server's API key.", envvar="LORAPLEX_API_KEY")
    base: str | None = flag(None, "The base model. Default: the pulled base.")


@grouped
def generate(
    description: Annotated[
        str, typer.Argument(help="A sentence that says what the adapter should do.")
    ],
    method: _MethodOptions,
    examples: _ExampleOptions,
    place: _PlaceOptions,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Input to try the adapter on. Can be repeated."),
    ] = None,
) -> None:
    """Make a LoRA from a description, show where it came from, and try it."""
    from .server_client import errors_in_red

    _check_place(place)
    if place.server is None and method.method in ("sg-lora", "icm-lora"):
        raise typer.BadParameter(
            f"--method {method.method} mixes the adapters of a server: add --server URL"
        )
    if place.out is not None:
        _check_out(place.out, place.overwrite)
    with errors_in_red():
        order = _order(description, method, examples.examples)
        if place.server is not None:
            _on_server(place, order, prompt or [], examples.budget)
        elif order.examples:
            _learn(order, examples.budget, place, prompt or [])
        else:
            _here(order, place, prompt or [])


def _check_place(place: _PlaceOptions) -> None:
    """Raise BadParameter for options that would have no effect."""
    if place.server is None and place.name is not None:
        raise typer.BadParameter(
            "--name is for a server: add --server URL, or write a folder with --out instead"
        )
    if place.server is not None and place.out is not None:
        raise typer.BadParameter(
            "--out writes a folder here, and with --server the server keeps the adapter: leave out "
            "--server, or give --name instead of --out"
        )
    if place.server is not None and place.base is not None:
        raise typer.BadParameter(
            "--base is for adapters that are made here, and a server uses its own: leave out --base"
        )


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise BadParameter unless --out is free, or holds an adapter and --overwrite is given."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / "adapter_config.json").exists():
        raise typer.BadParameter(f"{out} holds files that are no adapter; choose a new folder")
    if not overwrite:
        raise typer.BadParameter(f"{out} holds an adapter already; give --overwrite to replace")


def _order(
    description: str, options: _MethodOptions, examples: Path | None
) -> AdapterGenerationRequest:
    """Raises UnfitExamples."""
    from loraplex_generation.examples import read_pairs
    from loraplex_generation.request import AdapterGenerationRequest

    inputs = [] if options.prompts_from is None else options.prompts_from.read_text().splitlines()
    pairs = [] if examples is None else read_pairs(examples)
    return AdapterGenerationRequest(
        description,
        wordings=tuple(options.wording or ()),
        prompts=tuple(line for line in inputs if line.strip()),
        method=options.method,
        seed=options.seed,
        samples=options.samples,
        examples=tuple((pair.prompt, pair.answer) for pair in pairs),
        force=options.force,
    )


def _here(order: AdapterGenerationRequest, place: _PlaceOptions, prompts: list[str]) -> None:
    from loraplex_generation.multi_task import MultiTaskAdapter
    from loraplex_generation.shipped import shipped_folder
    from loraplex_server.model.loading.pull import public_name, resolve_model

    directory = resolve_model(place.base)
    name = public_name(place.base, directory)
    generator = MultiTaskAdapter.load(shipped_folder(), base_name=name, base_directory=directory)
    _finish(generator.generate(order), place.out, directory, prompts)


def _learn(
    order: AdapterGenerationRequest, budget_s: float, place: _PlaceOptions, prompts: list[str]
) -> None:
    import asyncio

    from rich.progress import Progress
    from transformers import AutoTokenizer

    from loraplex_generation.errors import NothingLearnt
    from loraplex_server.adapters.learning.example_learner import ExampleLearner
    from loraplex_server.learning_parts import folder_thread, generator_finder, starts_of
    from loraplex_server.model.loading.pull import public_name, resolve_model

    directory = resolve_model(place.base)
    name = public_name(place.base, directory)
    thread = folder_thread(directory)
    starts = starts_of(generator_finder(name, directory))
    learner = ExampleLearner(thread, AutoTokenizer.from_pretrained(directory), name, starts)
    pairs = learner.prepare(order)
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("learning", total=1.0)
            learnt = asyncio.run(
                learner.learn(
                    order,
                    pairs,
                    "",
                    budget_s,
                    lambda now: progress.update(task, description=now.stage, completed=now.share),
                )
            )
    finally:
        thread.close()
    if learnt.adapter is None:
        raise NothingLearnt(len(order.examples))
    card = {**learnt.adapter.card, "refinement": learnt.refinement}
    _finish(replace(learnt.adapter, card=card), place.out, directory, prompts)


def _finish(
    adapter: GeneratedAdapter, out: Path | None, directory: Path, prompts: list[str]
) -> None:
    """Show and write an adapter, and try it on prompts."""
    _show_card(adapter.card)
    if out is not None:
        _write(adapter, out)
        typer.echo(f"wrote {out}")
    if not prompts:
        return
    from tempfile import TemporaryDirectory

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    with TemporaryDirectory() as scratch:
        _write(adapter, Path(scratch, "adapter"))
        base = AutoModelForCausalLM.from_pretrained(directory)
        model = PeftModel.from_pretrained(base, Path(scratch, "adapter"))
    system = adapter.system_prompt
    head = [] if system is None else [{"role": "system", "content": system}]
    for prompt in prompts:
        encoded = tokenizer.apply_chat_template(
            [*head, {"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**encoded, max_new_tokens=64, do_sample=False)
        reply = tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        typer.echo(f"{prompt}  →  {reply}")


def _write(adapter: GeneratedAdapter, out: Path) -> None:
    """Write the folder beside ``out`` and rename it, so that Ctrl-C leaves no partial folder."""
    import json
    from tempfile import TemporaryDirectory

    from safetensors.torch import save_file

    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        fresh = Path(beside, "new")
        fresh.mkdir()
        (fresh / "adapter_config.json").write_text(json.dumps(adapter.config, indent=1) + "\n")
        defaults = {"system_prompt": adapter.system_prompt} if adapter.system_prompt else {}
        card = {"provenance": adapter.card, "defaults": defaults}
        (fresh / "loraplex_card.json").write_text(json.dumps(card, indent=1) + "\n")
        save_file(adapter.tensors, fresh / "adapter_model.safetensors")
        if out.exists():
            out.rename(Path(beside, "old"))
        fresh.rename(out)


def _on_server(
    place: _PlaceOptions, order: AdapterGenerationRequest, prompts: list[str], budget_s: float
) -> None:
    from .server_client import answer_of, reached, server_client

    assert place.server is not None
    fields = asdict(order)
    del fields["examples"], fields["library"]
    if order.examples:
        pairs = [asdict(pair) for pair in order.pairs]
        fields |= {"examples": pairs, "budget_s": budget_s, "wait": True}
    if place.name is not None:
        fields["name"] = place.name
    timeout_s = 120 + 5 * budget_s  # other jobs may come first
    with (
        reached(place.server),
        server_client(place.server, place.api_key, timeout_s) as client,
    ):
        card = answer_of(client.post("/v1/adapters/generate", json=fields))
        _show_card(card["provenance"])
        typer.echo(f"registered as {card['name']}")
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}]
            chat = {"model": card["name"], "messages": messages}
            body = {**chat, "temperature": 0, "max_tokens": 64}
            reply = answer_of(client.post("/v1/chat/completions", json=body))
            typer.echo(f"{prompt}  →  {reply['choices'][0]['message']['content']}")


def _show_card(card: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    rows = {"method": str(card["method"])}
    parts = card.get("parts")
    if isinstance(parts, dict):
        rows["made of"] = " ".join(f"{weight:+.2f}·{part}" for part, weight in parts.items())
    learned = card.get("refinement")
    if isinstance(learned, dict) and learned["finished"]:
        rows["start"] = (
            f"{learned['start']}, then {learned['steps']} steps in {learned['seconds']} s"
        )
        if learned["start_is_right"]:
            rows["start"] = f"{learned['start']}, which gets every pair right: nothing was trained"
        if learned["timed_out"]:
            rows["start"] += "; more time (--budget) may gain more"
        for who in ("base", "turns", "after"):
            score = learned["held_out"][who]
            rows[f"held out, {who}"] = (
                f"{score['exact']} of {score['of']} exact, nll {score['nll']:.2f}"
            )
    for label, value in rows.items():
        table.add_row(label, str(value))
    Console().print(table)
