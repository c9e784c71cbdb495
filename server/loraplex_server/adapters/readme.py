"""What an adapter's README says it does, for its card and for ``auto`` to route by.

Most adapters carry a README that a library wrote (PEFT, transformers, TRL): it tells nothing of the
task, so nothing of it becomes a description.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["describe"]

_MAX_CHARACTERS = 300
_NO_PROSE = re.compile(r"<!--.*?-->|^```.*?^```|^---\n.*?^---$", re.DOTALL | re.MULTILINE)

# Sentences of generated model cards, by how they start.
_BOILERPLATE = (
    "Users (both direct and downstream) should be made aware",
    "Use the code below to get started",
    "Carbon emissions can be estimated",
    "More information needed",
    "This model is a fine-tuned version of",
    "This model was trained with",
    "This modelcard aims to be a base template",
    "It achieves the following results",
    "It has been trained using",
    "The following ",  # hyperparameters, quantization config
    "Cite ",
)


def describe(folder: Path) -> str | None:
    """The first line of prose that somebody wrote, at most 300 characters; None if none did."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for line in _NO_PROSE.sub("", text).splitlines():
        line = line.strip()
        if line[:1].isalpha() and not line.startswith(_BOILERPLATE):
            return line[:_MAX_CHARACTERS]
    return None
