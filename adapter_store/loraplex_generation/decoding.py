"""Greedy replies of a frozen base under a generated adapter, without a server."""

from __future__ import annotations

import torch
from torch import Tensor

from .frozen_base import FrozenBase, LoraFA
from .layout import AdapterLayout
from .packing import ChatCodec, Row, pack

__all__ = ["greedy_reply"]


@torch.inference_mode()
def greedy_reply(
    base: FrozenBase,
    codec: ChatCodec,
    prompt: str,
    layout: AdapterLayout | None = None,
    vector: Tensor | None = None,
    *,
    max_tokens: int = 48,
) -> str:
    """The reply to `prompt` as a chat message; no KV cache, so for short replies only."""
    adapters = None
    if layout is not None and vector is not None:
        adapters = LoraFA(layout, vector[None], base.dtype)
    prompt_tokens = codec.prompt(prompt).tokens
    reply: list[int] = []
    for _ in range(max_tokens):
        row = Row((*prompt_tokens, *reply), 0)
        hidden = base.hidden(pack(codec.head, [[row]]), adapters)[0, -1]
        token = int((base.output_head @ hidden).argmax())
        if token == codec.end:
            break
        reply.append(token)
    return codec.text(reply)
