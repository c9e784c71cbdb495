"""vLLM on a GPU, installed beside us or in a venv of its own."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.systems import BASE, System


class VllmGpu(System):
    name = "vllm"

    def __init__(self, venv: Path | None = None, *, max_rank: int = 16) -> None:
        """``max_rank`` of the adapters: vLLM pads all of them to it."""
        super().__init__(venv)
        self._max_rank = max_rank

    def _program(self) -> str | None:
        if self.venv is not None:
            return str(self.venv / "bin" / "vllm")
        beside_us = Path(sys.executable).with_name("vllm")  # which need not be on the PATH
        return str(beside_us) if beside_us.exists() else shutil.which("vllm")

    def missing(self) -> str | None:
        program = self._program()
        if program is None or not Path(program).exists():
            return "vllm is not installed (pip install vllm)"
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        command = [
            str(self._program()),
            "serve",
            str(model),
            f"--served-model-name={BASE}",
            f"--dtype={dtype or 'auto'}",
            f"--port={port}",
        ]
        if adapters:
            command += [
                "--enable-lora",
                f"--max-loras={len(adapters)}",
                f"--max-lora-rank={self._max_rank}",
                f"--max-cpu-loras={2 * len(adapters)}",
                "--lora-modules",
                *(f"{path.name}={path}" for path in adapters),
            ]
        return command, {"HF_HUB_OFFLINE": "1"}

    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        return {"model": name or BASE}
