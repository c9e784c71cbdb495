"""`loraplex generator`: fits SG-LoRA and ICM-LoRA to the adapters of a store or of folders."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from loraplex_adapter_store.stored_adapters import StoredAdapter
    from loraplex_generation.experts.expert import Expert

Report = Callable[[str, float], None]  # gets a stage and the share of it that is done
METHODS = ("sg-lora", "icm-lora")
_TOWERS = ("text_model.", "vision_model.")  # of CLIP and SigLIP

generator = typer.Typer(
    name="generator",
    help="Fit the methods that make adapters from other adapters.",
    no_args_is_help=True,
)


@generator.callback()
def root() -> None:
    """Fit the methods that make adapters from other adapters."""


@generator.command()
def train(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder of the result, for `serve --generator-dir`."),
    ],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders with a PEFT adapter in each subfolder, described by a card.json or a "
            "README.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    from_store: Annotated[
        bool,
        typer.Option("--from-store", help="Use the adapters of a server. The server may run."),
    ] = False,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="State directory of the server (`serve --state-dir`). Default: the only directory "
            "in $LORAPLEX_HOME/adapters.",
            envvar="LORAPLEX_STATE_DIR",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Fit only this method, sg-lora or icm-lora. Default: both."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model, for icm-lora, for folders and for adapters of a CLIP: a pulled name, "
            "a Hub id or a directory."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps of each network.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the networks.", min=0)] = 0,
) -> None:
    """Fit SG-LoRA and ICM-LoRA to described adapters of one rank and target set.

    icm-lora reads states of the base for the example prompts of each adapter's card. On a CLIP
    there is sg-lora alone, and the CLIP itself embeds the descriptions.

        loraplex generator train --from-store --out generator
        loraplex serve --generator-dir generator
    """
    import time

    from loraplex_generation.experts.fitted import EXPERTS_FILE, FittedExperts
    from loraplex_generation.experts.icm_lora import IcmRecipe
    from loraplex_generation.experts.library import library_of
    from loraplex_generation.experts.sg_lora import SgRecipe

    from .server_client import errors_in_red

    if not folders and not from_store:
        raise typer.BadParameter("nothing to fit: give --from-store, or folders of adapters")
    if unknown := set(method or ()) - set(METHODS):
        raise typer.BadParameter(f"--method is {unknown.pop()!r}; write sg-lora or icm-lora")
    began = time.monotonic()
    with errors_in_red(), _bars() as report:
        adapters = _adapters_of(_state_directory(state_dir)) if from_store else []
        with _folder_store(folders or [], base) as of_folders:
            library = library_of([*adapters, *of_folders])
        tower = _tower_of_texts(library.experts, base)
        states = None
        if tower is None and (not method or "icm-lora" in method):
            states = _states(library.experts, base, lambda share: report("states", share))
        fitted = FittedExperts.fit(
            library.experts,
            _embeddings([expert.description for expert in library.experts], tower),
            library.base_fingerprint,
            states,
            by_base=tower is not None,
            sg_recipe=SgRecipe(n_steps=steps, seed=seed),
            icm_recipe=IcmRecipe(n_steps=steps, seed=seed),
            report=report,
        )
        fitted.save(out / EXPERTS_FILE)
    for sentence in library.left_out:
        typer.echo(f"left out: {sentence}")
    n_bytes = (out / EXPERTS_FILE).stat().st_size
    typer.echo(
        f"{out / EXPERTS_FILE}: {len(library.experts)} adapters ({library.n_bytes / 1e6:.1f} MB) "
        f"in {n_bytes / 1e6:.1f} MB, fitted in {time.monotonic() - began:.0f} s"
    )
    typer.echo(f"serve it: loraplex serve --generator-dir {out}")


def _state_directory(given: Path | None) -> Path:
    """Raises StoreError if the directory has to be named."""
    from loraplex_adapter_store.errors import StoreError
    from loraplex_server.model.loading.pull import loraplex_home

    if given is not None:
        return given
    known = sorted(path.parent for path in (loraplex_home() / "adapters").glob("*/contents"))
    if len(known) != 1:
        raise StoreError(f"{len(known)} servers have stored adapters here; give --state-dir")
    return known[0]


def _adapters_of(root: Path) -> list[StoredAdapter]:
    from loraplex_adapter_store.stored_adapters import stored_adapters

    return stored_adapters(root)


@contextlib.contextmanager
def _folder_store(folders: Sequence[Path], base: str | None) -> Iterator[list[StoredAdapter]]:
    """Read the adapters of folders through a store in a temporary directory. Raises StoreError."""
    if not folders:
        yield []
        return
    from tempfile import TemporaryDirectory

    from transformers import AutoModelForCausalLM

    from loraplex_adapter_store.base_spec import BaseSpec
    from loraplex_adapter_store.store import AdapterStore
    from loraplex_server.adapters.adding.adapter_folders import find_folders, put_folder
    from loraplex_server.model.loading.pull import resolve_model

    directory = resolve_model(base)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    with TemporaryDirectory() as state:
        with AdapterStore(Path(state), BaseSpec.of(model, directory.name)) as store:
            for folder in folders:
                for module in find_folders(folder):
                    put_folder(store, module)
        yield _adapters_of(Path(state))


def _tower_of_texts(experts: Sequence[Expert], base: str | None) -> Path | None:
    """Return the folder of the base if its tower of texts embeds descriptions, else None.

    Raises StoreError for adapters of a CLIP if the base is not named.
    """
    from loraplex_adapter_store.errors import StoreError
    from loraplex_server.model.loading.pull import resolve_model

    if not any(path.startswith(_TOWERS) for path in experts[0].factors):
        return None
    if base is None:
        raise StoreError(
            "the adapters are those of a CLIP, which embeds their descriptions itself; name it "
            "with --base"
        )
    return resolve_model(base)


def _embeddings(texts: Sequence[str], tower: Path | None) -> Tensor:
    """Return the embeddings [n_texts, width] of texts, by a CLIP or by the sentence encoder."""
    from loraplex_generation.experts.tower_sentences import tower_sentences
    from loraplex_generation.sentences import SentenceEncoder
    from loraplex_server.model.loading.pull import resolve_encoder

    if tower is None:
        return SentenceEncoder(resolve_encoder()).sentences(texts)
    return tower_sentences(tower, texts)


def _states(
    experts: Sequence[Expert], base: str | None, report: Callable[[float], None]
) -> list[Tensor]:
    """Return the states of each expert's texts: the description alone, then with its prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from loraplex_generation.experts.task_states import last_states
    from loraplex_server.model.loading.pull import resolve_model

    directory = resolve_model(base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval().to(device)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    states = []
    for i, expert in enumerate(experts):
        lines = [f"{expert.description}\n{prompt}" for prompt in expert.prompts]
        states.append(last_states(model, tokenizer, [expert.description, *lines]))
        report((i + 1) / len(experts))
    return states


@contextlib.contextmanager
def _bars() -> Iterator[Report]:
    """Show a progress bar for each stage on a terminal."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, share: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=1.0)
            progress.update(tasks[stage], completed=share)

        yield report
