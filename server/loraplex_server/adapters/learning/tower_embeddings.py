"""Embeddings of descriptions by the base's own tower of texts, as SG-LoRA reads them on a CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.plan import PoolingMode
from loraplex_generation.experts.embeddings import Encode
from loraplex_server.engine.requests.client import EngineClient
from loraplex_server.model.encoder.image_reader import ImageReader
from loraplex_server.tenant_shares import TenantThreads

from .base_states import pooled_states

_AT_ONCE = 32  # texts of one call in the engine
_MAX_KEPT = 10_000


class TowerEmbeddings:
    """Embeds texts through the engine, without an adapter. Event loop only.

    Vectors are kept for later calls of the same tenant.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: PreTrainedTokenizerBase,
        reader: ImageReader,
        threads: TenantThreads,
    ) -> None:
        """``reader``: that of a base with a tower of texts."""
        self._engine, self._tokenizer = engine, tokenizer
        self._reader, self._threads = reader, threads
        self._kept: dict[tuple[str, str], Tensor] = {}  # by tenant and text

    async def read(self, texts: Sequence[str], tenant: str) -> Encode:
        """Return a function that has the embeddings of ``texts``. Raises ApiError.

        Texts are cut to the positions of the tower, as CLIP's processor does.
        """
        if len(self._kept) > _MAX_KEPT:
            self._kept = {}
        kept = self._kept
        fresh = [text for text in dict.fromkeys(texts) if (tenant, text) not in kept]
        prompts = await self._threads.run(tenant, lambda: [self._ids(text) for text in fresh])
        for first in range(0, len(fresh), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            vectors = await pooled_states(
                self._engine, prompts[part], PoolingMode.MEAN, tenant, param="description"
            )
            for text, vector in zip(fresh[part], vectors, strict=True):
                kept[tenant, text] = F.normalize(vector, dim=-1)
        known = {text: kept[tenant, text] for text in texts}
        return lambda wanted: torch.stack([known[text] for text in wanted])

    def _ids(self, text: str) -> tuple[int, ...]:
        longest = self._reader.max_text_tokens
        ids = tuple(self._tokenizer.backend_tokenizer.encode(text).ids)
        if len(ids) > longest:
            ids = (*ids[: longest - 1], ids[-1])  # the last token ends a text
        return self._reader.padded(ids, self._tokenizer.pad_token_id or 0)
