"""A base that chats, ready to train through: its weights and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .frozen_base import FrozenBase
from .packing import ChatCodec

__all__ = ["ChatBase"]


class ChatBase(NamedTuple):
    base: FrozenBase
    codec: ChatCodec

    @classmethod
    def of_directory(cls, directory: Path, *, mapped: bool = False) -> ChatBase:
        """From a model directory that ``FrozenBase`` reads; ``mapped`` as it says."""
        from transformers import AutoTokenizer

        codec = ChatCodec(AutoTokenizer.from_pretrained(directory))
        return cls(FrozenBase(directory, mapped=mapped), codec)
