"""Where vectors come from: the base through any adapter, or the sentence encoder.

tokenise → cut or refuse what is too long → read hidden states → one tensor a prompt
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from loraplex_adapter_store.plan import HeadPlan, PoolingMode, PoolingPlan
from loraplex_server.adapters.encoder_model import EncoderModel
from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import invalid
from loraplex_server.api.request_info import RequestInfo
from loraplex_server.api.state import AppState
from loraplex_server.engine.client import GenerationRequest
from loraplex_server.engine.pooling import Pooling
from loraplex_server.engine.sampling_params import SamplingParams
from loraplex_server.metrics.call_log import CallRecord

from .chat_prompt import ChatPrompt, defaults_of
from .vector_batch import VectorBatch

__all__ = ["AdapterVectors", "Cut", "EncoderVectors", "Ids", "VectorSource"]

T = TypeVar("T")
Ids = tuple[int, ...]
_NOTHING = SamplingParams(max_tokens=0, temperature=0.0)
_ENCODER_BATCH = 16  # texts of one forward, after which other calls have their turn
_ENCODER_CHARS = 100  # of a text for each token that it may have


class VectorSource(ABC):
    """Of one call. ``read`` at most once; ``close`` in a ``finally``."""

    model: str  # what the answer says
    label: str  # what errors say
    adapter_param: str  # the field that named it, for errors
    adapter: Mapping[str, object] | None = None
    head: HeadPlan | None = None
    pooling: PoolingPlan
    max_tokens: int  # of a prompt
    width: int | None = None  # of a vector; None: known once there is one

    @abstractmethod
    async def encode(
        self, texts: Sequence[str], *, param: str, special: bool, cut: Cut
    ) -> list[Ids]: ...

    @abstractmethod
    async def encode_chat(self, chat: ChatPrompt) -> Ids: ...

    @abstractmethod
    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) for an id that is no token."""

    @abstractmethod
    async def read(self, prompts: Sequence[Ids], pooling: Pooling) -> list[Tensor]:
        """float32 [width], or [n_tokens, width], of each prompt. Raises ApiError."""

    @abstractmethod
    def close(self) -> None: ...


class Cut:
    """``truncate_prompt_tokens`` and ``truncation_side``."""

    def __init__(self, n_tokens: int | None, side: str | None) -> None:
        self.n_tokens = n_tokens
        self.left = side == "left"

    def limit(self, source: VectorSource) -> int | None:
        """None: nothing is cut. Raises ApiError (400) for more than there may be."""
        if self.n_tokens is None or self.n_tokens == -1:
            return None if self.n_tokens is None else source.max_tokens
        if self.n_tokens > source.max_tokens:
            raise invalid(
                f"truncate_prompt_tokens is {self.n_tokens}, a prompt may have "
                f"{source.max_tokens} tokens",
                "truncate_prompt_tokens",
            )
        return self.n_tokens

    def apply(self, prompts: Sequence[Ids], source: VectorSource, param: str) -> list[Ids]:
        """Raises ApiError (400) for prompts that are empty or too long."""
        limit = self.limit(source)
        if limit is not None:
            prompts = [
                ids[max(0, len(ids) - limit) :] if self.left else ids[:limit] for ids in prompts
            ]
        for index, ids in enumerate(prompts):
            where = param if len(prompts) == 1 else f"{param}[{index}]"
            if not ids:
                raise invalid(f"{where} must not be empty", param)
            if len(ids) > source.max_tokens:
                raise invalid(
                    f"{where} has {len(ids)} tokens, {source.model} reads {source.max_tokens}; "
                    "shorten it or set truncate_prompt_tokens",
                    param,
                    "context_length_exceeded",
                )
        return list(prompts)


class AdapterVectors(VectorSource):
    def __init__(
        self,
        state: AppState,
        info: RequestInfo,
        resolved: ResolvedAdapter,
        record: CallRecord,
        *,
        call_id: str,
        model: str,
        adapter_param: str,
        cache_salt: str | None,
        load_s: float,
        prompt_param: str,
    ) -> None:
        """Takes over ``resolved``."""
        plan = None if resolved.lease is None else resolved.lease.plan
        prefix = None if plan is None else plan.prefix
        self.model = model
        self.adapter = resolved.to_json()
        self.label = f"adapter {resolved.label!r}" if resolved.lease else "the base model"
        self.adapter_param = adapter_param
        self.head = resolved.head
        self.pooling = (None if plan is None else plan.pooling) or state.pooling
        self.max_tokens = state.engine.max_model_len - (0 if prefix is None else prefix.n_virtual)
        self.width = state.store.base.hidden_size
        self._state, self._info, self._resolved = state, info, resolved
        self._record = record
        self._call_id, self._load_s, self._prompt_param = call_id, load_s, prompt_param
        self._salt = f"{info.tenant}/{cache_salt or ''}".strip("/")
        self._batch: VectorBatch | None = None

    async def encode(
        self, texts: Sequence[str], *, param: str, special: bool, cut: Cut
    ) -> list[Ids]:
        encoded = await self._state.text.encode_many(texts, add_special_tokens=special, param=param)
        return cut.apply(encoded, self, param)

    async def encode_chat(self, chat: ChatPrompt) -> Ids:
        text, defaults = self._state.text, defaults_of(self._resolved)
        protocol = chat.protocol(text, self._resolved, defaults)
        return await chat.ids(text, protocol, defaults, tenant=self._info.tenant)

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        self._state.text.check_ids(ids, param)

    async def read(self, prompts: Sequence[Ids], pooling: Pooling) -> list[Tensor]:
        assert self._batch is None
        requests = [
            GenerationRequest(
                request_id=f"{self._call_id}-{index}",
                prompt_ids=ids,
                sampling=_NOTHING,
                adapter=self._resolved.lease,
                cache_salt=self._salt,
                share=self._info.share,
                pooling=pooling,
            )
            for index, ids in enumerate(prompts)
        ]
        n_prompt = sum(map(len, prompts))
        batch = self._batch = VectorBatch(
            self._state.engine,
            requests,
            chosen=self._resolved,
            live=self._state.live,
            metrics=self._state.metrics.call(
                self._resolved.metrics_label,
                load_s=self._load_s,
                n=len(requests),
                max_tokens=0,
                n_prompt=n_prompt,
                record=self._record,
            ),
            meter=self._info.meter,
            prompt_param=self._prompt_param,
        )
        self._info.n_prompt_tokens, self._info.n_output_tokens = n_prompt, 0
        found: list[Tensor | None] = [None] * len(requests)
        async for index, pooled in batch.results():
            found[index] = pooled
        return [pooled for pooled in found if pooled is not None]

    def close(self) -> None:
        if self._batch is None:
            self._resolved.release()
        else:
            self._batch.close()


class EncoderVectors(VectorSource):
    """The sentence encoder gives the mean over a text's tokens, and nothing else."""

    def __init__(self, state: AppState, info: RequestInfo, encoder: EncoderModel) -> None:
        self.model = self.label = encoder.name
        self.adapter_param = "model"
        self.max_tokens = encoder.max_tokens
        self.pooling = PoolingPlan(PoolingMode.MEAN, normalize=True)
        self._state, self._info, self._encoder = state, info, encoder

    async def encode(
        self, texts: Sequence[str], *, param: str, special: bool, cut: Cut
    ) -> list[Ids]:
        if not special:
            raise invalid(f"{self.model} reads its special tokens always", "add_special_tokens")
        limit = cut.limit(self)
        for text in texts:
            if len(text) > self.max_tokens * _ENCODER_CHARS:
                raise invalid(
                    f"{len(text):,} characters cannot fit; {self.model} reads at most "
                    f"{self.max_tokens * _ENCODER_CHARS:,}",
                    param,
                    "context_length_exceeded",
                )

        def tokenize() -> list[list[int]]:
            model = self._encoder.shared.get()
            return model.tokenize(texts, max_tokens=limit, cut_left=cut.left)

        return cut.apply([tuple(ids) for ids in await self._run(tokenize)], self, param)

    async def encode_chat(self, chat: ChatPrompt) -> Ids:
        raise invalid(f"{self.model} takes texts, not messages", "messages")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        raise invalid(f"{self.model} takes texts, not token ids", param)

    async def read(self, prompts: Sequence[Ids], pooling: Pooling) -> list[Tensor]:
        if pooling.mode is not PoolingMode.MEAN:
            raise invalid(f"{self.model} gives one vector a text, not one a token", "task")
        n_prompt = sum(map(len, prompts))
        if self._info.meter is not None:
            await self._info.meter.reserve_tokens(n_prompt)
        self._info.n_prompt_tokens, self._info.n_output_tokens = n_prompt, 0
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
        rows = torch.empty(0)
        for at in range(0, len(by_length), _ENCODER_BATCH):
            part = by_length[at : at + _ENCODER_BATCH]
            ids = [prompts[index] for index in part]
            means = await self._run(partial(self._means, ids))
            if not len(rows):
                rows = torch.empty(len(prompts), means.shape[1])
            rows[part] = means
        return list(rows)

    def _means(self, ids: Sequence[Ids]) -> Tensor:
        return self._encoder.shared.get().means(ids)

    def close(self) -> None:
        return None

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._state.pools.encoder, work)
