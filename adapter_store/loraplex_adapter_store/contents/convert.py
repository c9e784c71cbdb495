"""Converts adapters that the store does not read: pickles, and residual-trained LoRAs.

Only ``unpickle_worker`` opens a pickle, in its own process: weights-only, with an empty environment
and bounded memory, time and output. The result is checked like any upload.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from loraplex_adapter_store.errors import LimitExceeded, MalformedFile, SourceError
from loraplex_adapter_store.families.low_rank.deltas import draws
from loraplex_adapter_store.families.low_rank.residual import RECOMPUTED
from loraplex_adapter_store.files.adapter_config import AdapterConfig
from loraplex_adapter_store.files.file_names import COMPANION_FILES, is_pickle_name
from loraplex_adapter_store.files.safetensors_reader import SafetensorsFile
from loraplex_adapter_store.limits import StoreLimits

from .content_files import CHAT_TEMPLATE_FILE, CONFIG_FILE, WEIGHTS_FILE

_TIMEOUT_S = 600
_PICKLES = ("adapter_model.bin", "mixlora_model.bin", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class Conversion:
    """The steps of a conversion, for the user."""

    source: str
    tensors: tuple[str, ...]
    dropped: tuple[str, ...]  # entries of the pickle that are not tensors
    steps: tuple[str, ...]


def convert_directory(
    source: Path,
    target: Path,
    limits: StoreLimits,
    *,
    initial: Path | None = None,
    init: str | None = None,
) -> Conversion:
    """Write a loadable adapter to ``target``, which must not exist.

    ``initial``: the adapter as saved before training (PiSSA, LoRA-GA, CorDA); its factors become
    lora_A0/lora_B0. ``init``: the rule that rewrote the base in training, which the server then
    computes again: pissa or olora. Raises SourceError, MalformedFile or LimitExceeded.
    """
    if init not in (None, *RECOMPUTED):
        raise SourceError(f"init is {init!r}; the server can recompute {' and '.join(RECOMPUTED)}")
    if target.exists():
        raise SourceError(f"{target} exists already")
    config_file = next(
        (n for n in (CONFIG_FILE, "mixlora_config.json") if (source / n).exists()), None
    )
    if config_file is None:
        raise SourceError(f"{source} has no {CONFIG_FILE}")
    with tempfile.TemporaryDirectory(prefix="loraplex-convert-") as folder:
        work = Path(folder)
        tensors, dropped, steps = _weights(source, work / WEIGHTS_FILE, limits)
        if init is not None:
            steps += (f"init_lora_weights set to {init}: the server subtracts it from the base",)
        if initial is not None:
            steps += (_add_initial(work / WEIGHTS_FILE, initial, limits),)
        config = AdapterConfig.parse((source / config_file).read_bytes(), limits)
        default = {"peft_type": "MIXLORA"} if "mixlora" in config_file else {}
        _write_config(
            work, {**default, **config.values, **({"init_lora_weights": init} if init else {})}
        )
        for name in (CHAT_TEMPLATE_FILE, *COMPANION_FILES):
            if (source / name).is_file():
                (work / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, work / name)
        with SafetensorsFile(work / WEIGHTS_FILE, limits) as checked:
            tensors = tuple(sorted(checked.entries))
        shutil.copytree(work, target)
    return Conversion(str(source), tensors, dropped, steps)


def draw_posterior(
    source: Path, target: Path, n_draws: int, seed: int, limits: StoreLimits
) -> tuple[Path, ...]:
    """Write ``n_draws`` plain LoRAs of an ABMLL to ``target/draw-0`` …; return their folders.

    Raises AdapterRefused for a damaged file.
    """
    config = AdapterConfig.parse((source / CONFIG_FILE).read_bytes(), limits).values
    with SafetensorsFile(source / WEIGHTS_FILE, limits) as file:
        tensors = {name: file.load(name) for name in file.entries}
    folders: list[Path] = []
    for number, (drawn_config, drawn) in enumerate(draws(config, tensors, n_draws, seed)):
        folder = target / f"draw-{number}"
        folder.mkdir(parents=True)
        _write_config(folder, drawn_config)
        save_file(drawn, folder / WEIGHTS_FILE)
        folders.append(folder)
    return tuple(folders)


def _write_config(folder: Path, values: Mapping[str, object]) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _weights(
    source: Path, target: Path, limits: StoreLimits
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    if (source / WEIGHTS_FILE).is_file():
        shutil.copyfile(source / WEIGHTS_FILE, target)
        return (), (), (f"{WEIGHTS_FILE}: copied",)
    pickle = next((source / name for name in _PICKLES if (source / name).is_file()), None)
    if pickle is None:
        pickles = sorted(entry.name for entry in source.iterdir() if is_pickle_name(entry.name))
        if len(pickles) != 1:
            raise SourceError(f"{source} has no {WEIGHTS_FILE} and no single pickle: {pickles}")
        pickle = source / pickles[0]
    if pickle.stat().st_size > limits.max_file_bytes:
        raise LimitExceeded(f"{pickle.name} exceeds {limits.max_file_bytes} bytes")
    tensors, dropped = _unpickle(pickle, target, limits)
    step = f"{pickle.name}: opened weights-only in a locked-down process, {len(tensors)} tensors"
    return tensors, dropped, (step,)


def _unpickle(
    source: Path, target: Path, limits: StoreLimits
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    worker = Path(__file__).with_name("unpickle_worker.py")
    arguments = (worker, source.resolve(), target, limits.max_file_bytes)
    try:
        process = subprocess.run(
            [sys.executable, "-I", *map(str, arguments)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_TIMEOUT_S,
            env={"OMP_NUM_THREADS": "1"},  # no keys, no proxies
            cwd=target.parent,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MalformedFile(f"{source.name} took longer than {_TIMEOUT_S} s to open") from None
    lines = process.stdout.strip().splitlines()
    answer = json.loads(lines[-1]) if lines else {"error": f"killed ({process.returncode})"}
    if "error" in answer:
        raise MalformedFile(f"{source.name} cannot be opened weights-only: {answer['error']}")
    return tuple(answer["tensors"]), tuple(answer["dropped"])


def _add_initial(weights: Path, initial: Path, limits: StoreLimits) -> str:
    with SafetensorsFile(initial / WEIGHTS_FILE, limits):  # the same checks as for any file
        start = load_file(initial / WEIGHTS_FILE)
    tensors = load_file(weights)
    added = {
        name.replace(".lora_A.", ".lora_A0.").replace(".lora_B.", ".lora_B0."): tensor
        for name, tensor in start.items()
        if ".lora_A." in name or ".lora_B." in name
    }
    if not added:
        raise SourceError(f"{initial} holds no lora_A and lora_B")
    save_file({**tensors, **added}, weights)
    return f"{len(added)} initial factors added as lora_A0 and lora_B0"
