"""Reads a Dockerfile and says what is wrong with it; enough of the format for ours."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Instruction", "Stage", "lint", "parse"]


@dataclass(frozen=True, slots=True)
class Instruction:
    name: str  # upper case
    text: str  # the rest, continued lines joined

    @property
    def is_exec_form(self) -> bool:
        return self.arguments is not None

    @property
    def arguments(self) -> list[str] | None:
        """Of the exec form; None in shell form."""
        text = self.text
        if self.name == "HEALTHCHECK":
            text = text.partition("CMD")[2].strip()
        try:
            value = json.loads(text)
        except ValueError:
            return None
        return value if isinstance(value, list) else None


@dataclass(slots=True)
class Stage:
    image: str
    name: str | None
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, name: str) -> Instruction | None:
        return next((i for i in reversed(self.instructions) if i.name == name), None)


def parse(path: Path) -> list[Stage]:
    """Raises ValueError."""
    stages: list[Stage] = []
    for instruction in _instructions(path.read_text(encoding="utf-8")):
        if instruction.name == "FROM":
            words = instruction.text.split()
            name = words[2] if len(words) == 3 and words[1].upper() == "AS" else None
            stages.append(Stage(words[0], name))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.name != "ARG":
            raise ValueError(f"{path.name}: {instruction.name} before FROM")
    if not stages:
        raise ValueError(f"{path.name}: no FROM")
    return stages


def lint(path: Path, context: Path) -> list[str]:
    """What a reviewer would complain of; empty if nothing."""
    stages = parse(path)
    final = stages[-1]
    problems = []
    names = {stage.name for stage in stages}
    for stage in stages:
        if stage.image not in names and not re.search(r":\d|@sha256:", stage.image):
            problems.append(f"FROM {stage.image} is not pinned to a version")
    problems += _lint_final(final)
    for stage in stages:
        for instruction in stage.instructions:
            problems += _lint_instruction(instruction, context)
    if len(stages) < 2:
        problems.append("one stage: compilers and sources end up in the image")
    return problems


def _lint_final(final: Stage) -> list[str]:
    problems = []
    user = final.last("USER")
    if user is None or user.text.split(":")[0] in ("root", "0"):
        problems.append("the last stage runs as root")
    elif not user.text.split(":")[0].isdigit():
        problems.append("USER by name: Kubernetes' runAsNonRoot needs a number")
    for name in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
        found = final.last(name)
        if found is None:
            problems.append(f"the last stage has no {name}")
        elif not found.is_exec_form:
            problems.append(f"{name} is in shell form: the shell would swallow the signals")
    health = final.last("HEALTHCHECK")
    if health is not None and "/health" not in health.text:
        problems.append("HEALTHCHECK does not ask /health")
    if final.last("VOLUME") is None:
        problems.append("no VOLUME: with a read-only root nothing could be written")
    return problems


def _lint_instruction(instruction: Instruction, context: Path) -> list[str]:
    text = instruction.text
    problems = []
    if instruction.name == "ADD":
        problems.append("ADD: use COPY")
    if instruction.name == "COPY" and "--from" not in text:
        problems += [
            f"COPY {word}: not there"
            for word in shlex.split(text)[:-1]
            if not (context / word).exists()
        ]
    if instruction.name == "RUN" and "apt-get install" in text:
        for wanted in ("--yes", "--no-install-recommends", "rm -rf /var/lib/apt/lists"):
            if wanted not in text:
                problems.append(f"apt-get install without {wanted}")
    if instruction.name == "ENV" and re.search(r"(KEY|TOKEN|PASSWORD|SECRET)\w*=", text):
        problems.append("a secret in ENV stays in the image")
    return problems


def _instructions(text: str) -> list[Instruction]:
    found = []
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    for line in joined.splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            found.append(Instruction(name.upper(), " ".join(rest.split())))
    return found
