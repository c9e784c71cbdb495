"""Embeddings of descriptions by the base's own tower of texts, as SG-LoRA reads them on a CLIP."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.plan import PoolingMode
from loraplex_generation.experts.embeddings import Encode
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.requests.client import EngineClient, GenerationRequest, TenantShare
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.engine.requests.run_to_end import run_to_end
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import from_engine
from loraplex_server.model.encoder.image_reader import ImageReader
from loraplex_server.tenant_shares import TenantThreads

_NO_SAMPLING = SamplingParams(max_tokens=0, temperature=0.0)
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
        share = TenantShare(f"generator:{tenant}")
        try:
            for first in range(0, len(fresh), _AT_ONCE):
                part = prompts[first : first + _AT_ONCE]
                vectors = await asyncio.gather(*[self._vector(ids, share) for ids in part])
                named = zip(fresh[first : first + _AT_ONCE], vectors, strict=True)
                kept.update({(tenant, text): vector for text, vector in named})
        except EngineError as error:
            raise from_engine(error, prompt_param="description") from error
        known = {text: kept[tenant, text] for text in texts}
        return lambda wanted: torch.stack([known[text] for text in wanted])

    def _ids(self, text: str) -> tuple[int, ...]:
        longest = self._reader.max_text_tokens
        ids = tuple(self._tokenizer.backend_tokenizer.encode(text).ids)
        if len(ids) > longest:
            ids = (*ids[: longest - 1], ids[-1])  # the last token ends a text
        if self._reader.pads_texts:
            ids += (self._tokenizer.pad_token_id or 0,) * (longest - len(ids))
        return ids

    async def _vector(self, ids: tuple[int, ...], share: TenantShare) -> Tensor:
        request = GenerationRequest(
            f"description-{uuid.uuid4().hex}",
            ids,
            _NO_SAMPLING,
            share=share,
            pooling=Pooling(PoolingMode.MEAN),
        )
        pooled = (await run_to_end(self._engine, request))[-1].pooled
        assert pooled is not None
        return F.normalize(pooled, dim=-1)
