"""Builds the CPU image without a Docker engine: its steps in a temporary folder, then a start.

    python -m deploy.replay        (`make docker-check` runs hadolint before)

ARG, ENV, WORKDIR, COPY and RUN of the build stage are carried out with /opt/loraplex and /src moved
into the folder. Lines with apt-get are left out, so a C++ compiler must be installed. The server of
the new venv must then refuse to listen to everybody without a key, answer /health, and end with
status 0 on SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from .dockerfile import Stage, parse

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[1]
_PORT = 8765


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-index", default="", help="TORCH_INDEX of the build")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraplex-image-") as folder:
        moved = Path(folder)
        build, serve = parse(_ROOT / "Dockerfile")
        environment = {
            "TORCH_INDEX": options.torch_index,
            "PATH": os.environ["PATH"],
            "PIP_QUIET": "1",
        }
        environment |= {
            k: v for k, v in os.environ.items() if k.startswith(("PIP_", "SSL_", "HOME"))
        }
        _replay(build, moved, environment)
        _check_start(serve, moved)
    print("the image's steps work: installed, started, healthy, drained")
    return 0


def _replay(stage: Stage, moved: Path, environment: dict[str, str]) -> None:
    where = moved
    for instruction in stage.instructions:
        text = _moved(instruction.text, moved)
        if instruction.name == "ARG":
            name, _, default = text.partition("=")
            environment.setdefault(name, default)
        elif instruction.name == "ENV":
            environment |= _variables(text, environment)
        elif instruction.name == "WORKDIR":
            where = Path(text)
            where.mkdir(parents=True, exist_ok=True)
        elif instruction.name == "COPY":
            *sources, target = shlex.split(text)
            for source in sources:
                _copy(_ROOT / source, where / target, into=len(sources) > 1)
        elif instruction.name == "RUN" and "apt-get" not in text:
            if text.startswith("python -m venv"):
                text = f"{shlex.quote(sys.executable)}{text.removeprefix('python')}"
            began = time.monotonic()
            subprocess.run(["bash", "-euc", text], check=True, cwd=where, env=environment)
            print(f"{time.monotonic() - began:6.1f} s  RUN {instruction.text}", flush=True)


def _check_start(stage: Stage, moved: Path) -> None:
    (moved / "data").mkdir()
    environment: dict[str, str] = {"PATH": os.environ["PATH"]}
    for instruction in stage.all("ENV"):
        environment |= _variables(_moved(instruction.text, moved), environment)
    environment |= {"LORAPLEX_HOST": "127.0.0.1", "LORAPLEX_PORT": str(_PORT)}
    entry, command = stage.last("ENTRYPOINT"), stage.last("CMD")
    words = [*(entry.arguments or ()), *(command.arguments or ())]
    words[0] = str(moved / "opt/loraplex/venv/bin" / words[0])
    open_to_all = {**environment, "LORAPLEX_HOST": "0.0.0.0"}
    refused = subprocess.run(words, env=open_to_all, capture_output=True, timeout=120, check=False)
    if refused.returncode == 0 or b"authentication" not in refused.stderr:
        raise RuntimeError("the image would serve everybody without a key")
    process = subprocess.Popen(words, env=environment, cwd=moved / "data")
    try:
        _wait_until_healthy(process, stage, environment)
        process.send_signal(signal.SIGTERM)
        if (status := process.wait(60)) != 0:
            raise RuntimeError(f"SIGTERM ended the server with status {status}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wait_until_healthy(
    process: subprocess.Popen[bytes], stage: Stage, environment: Mapping[str, str]
) -> None:
    """By the image's own HEALTHCHECK command."""
    health = stage.last("HEALTHCHECK")
    command = [sys.executable, *(health.arguments or ())[1:]]
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if (
            subprocess.run(command, env=environment, capture_output=True, check=False).returncode
            == 0
        ):
            return
        time.sleep(1)
    raise RuntimeError("HEALTHCHECK never succeeded")


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.egg-info", "benchmarks")
        shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
    else:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target if into or target.is_dir() else target.parent)


def _moved(text: str, moved: Path) -> str:
    for path in ("/opt/loraplex", "/src", "/data"):
        text = text.replace(path, f"{moved}{path}")
    return text


def _variables(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for word in shlex.split(text):
        name, _, value = word.partition("=")
        found[name] = value.replace("$PATH", environment.get("PATH", ""))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
