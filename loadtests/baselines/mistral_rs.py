"""mistral.rs, from a venv with `mistralrs` in it. Its package has no server: see the script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.systems import BASE, System

from .gguf_base import gguf_of


class MistralRs(System):
    """mistral.rs over a GGUF file, with a LoRA for each request."""

    name = "mistralrs"

    def missing(self) -> str | None:
        package = "lib/python*/site-packages/mistralrs"
        if self.venv is None or not any(self.venv.glob(package)):
            return "no mistralrs in --mistralrs-venv (pip install mistralrs in a venv of its own)"
        return None

    def command(
        self, model: Path, adapters: Sequence[Path], port: int, dtype: str | None, work: Path
    ) -> tuple[list[str], Mapping[str, str]]:
        assert self.venv is not None
        file = gguf_of(model)
        if file is None:
            raise RuntimeError("mistral.rs is measured on GGUF files; give one as --model")
        script = Path(__file__).with_name("mistral_rs_server.py")
        command = [str(self.venv / "bin" / "python"), str(script), str(file), str(port)]
        return [*command, *map(str, adapters)], {"HF_HUB_OFFLINE": "1"}

    def body(self, family: str, name: str | None) -> Mapping[str, Any]:
        return {"model": BASE} if name is None else {"model": BASE, "adapter": name}
