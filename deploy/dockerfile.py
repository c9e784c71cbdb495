"""A Dockerfile as its stages: what `replay` carries out and the tests look at."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

__all__ = ["Instruction", "Stage", "parse"]


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str  # upper case
    text: str  # the rest, continued lines joined

    @property
    def arguments(self) -> list[str] | None:
        """Of the exec form, `["loraplex", "serve"]`; None in shell form."""
        text = self.text.partition("CMD")[2] if self.name == "HEALTHCHECK" else self.text
        try:
            value = json.loads(text)
        except ValueError:
            return None
        return value if isinstance(value, list) else None


@dataclass(slots=True)
class Stage:
    image: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [found for found in self.instructions if found.name == name]

    def last(self, name: str) -> Instruction:
        """The one that counts. Raises ValueError if there is none."""
        found = self.all(name)
        if not found:
            raise ValueError(f"the stage from {self.image} has no {name}")
        return found[-1]


def parse(path: Path) -> list[Stage]:
    """Comments and what stands before the first FROM are left out. Raises ValueError."""
    stages: list[Stage] = []
    content = io.BytesIO(path.read_bytes())
    for step in DockerfileParser(fileobj=content, env_replace=False).structure:
        if step["instruction"] == "FROM":
            stages.append(Stage(step["value"].split()[0]))
        elif stages and step["instruction"] != "COMMENT":
            text = " ".join(step["value"].split())
            stages[-1].instructions.append(Instruction(step["instruction"], text))
    if not stages:
        raise ValueError(f"{path.name}: no FROM")
    return stages
