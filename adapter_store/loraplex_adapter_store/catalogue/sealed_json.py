"""JSON objects of the catalogue, each with the checksum of its text: a damaged one is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["seal", "unseal"]


def seal(value: Mapping[str, object]) -> bytes:
    text = json.dumps(value)
    return f'{{"sha256": "{_sha256(text)}", "value": {text}}}'.encode()


def unseal(data: bytes) -> dict[str, Any]:
    """What ``seal`` got. Raises ValueError, KeyError or TypeError for anything else."""
    sealed = json.loads(data)
    value: dict[str, Any] = sealed["value"]
    if sealed["sha256"] != _sha256(json.dumps(value)):
        raise ValueError("the checksum does not fit")
    return value


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
