"""The sources of vectors: the base through any adapter, or the sentence encoder.

tokenise → cut or refuse what is too long → read hidden states → one tensor a prompt
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from loraplex_adapter_store.plan import HeadPlan, PoolingMode, PoolingPlan
from loraplex_server.adapters.resolving.resolved_adapter import AdapterRequest, ResolvedAdapter
from loraplex_server.adapters.resolving.sentence_encoder import EncoderModel, pieces
from loraplex_server.api.request_info import RequestInfo
from loraplex_server.api.serving.chat.chat_prompt import AdapterChat, ChatPrompt
from loraplex_server.api.serving.chat.image_sources import ImageSources
from loraplex_server.api.serving.text_generation.engine_call import CallContext
from loraplex_server.api.state import AppState
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import from_image, invalid
from loraplex_server.images import ImageRefused
from loraplex_server.metrics.server_metrics import CallMetrics
from loraplex_server.text.text_pipeline import EncodedText

from .prompt import Ids, Prompt
from .vector_batch import VectorBatch

S = TypeVar("S", bound=Sized)
T = TypeVar("T")
_NO_SAMPLING = SamplingParams(max_tokens=0, temperature=0.0)
_PIECE_TOKENS = 256  # of one forward, with padding; texts of other tenants go between two
_PIECE_CHARS = 1 << 16  # that are tokenised at once
_ENCODER_CHARS = 100  # characters of a text for each token of the limit


class VectorSource(ABC):
    """The source of one call. ``read`` at most once; ``close`` in a ``finally``."""

    model: str  # as the answer names it
    label: str  # as errors name it
    adapter_param: str  # the field that names the adapter, for errors
    adapter: Mapping[str, object] | None = None
    head: HeadPlan | None = None
    pooling: PoolingPlan
    max_tokens: int  # of one prompt
    width: int | None = None  # of a vector; None: known after ``read``
    digest: str = ""  # of the adapter; empty without one

    @abstractmethod
    async def encode(
        self, texts: Sequence[str], *, param: str, special: bool, cut: Cut
    ) -> list[Prompt]: ...

    @abstractmethod
    async def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, param: str, cut: Cut
    ) -> list[Prompt]:
        """Return each pair as one prompt."""

    @abstractmethod
    async def encode_images(self, images: Sequence[str], *, param: str) -> list[Prompt]:
        """Decode and process images, which are ``data:`` URLs or base64. Raises ApiError."""

    @abstractmethod
    async def encode_chat(self, chat: ChatPrompt) -> Prompt:
        """Raises ApiError, also for an image that cannot be read."""

    @abstractmethod
    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError (400) for an id outside the vocabulary."""

    @abstractmethod
    async def read(self, prompts: Sequence[Prompt], pooling: Pooling) -> list[Tensor]:
        """Return float32 [width], or [n_tokens, width], for each prompt. Raises ApiError."""

    @abstractmethod
    def close(self) -> None: ...


class Cut:
    """Truncates prompts as ``truncate_prompt_tokens`` and ``truncation_side`` say."""

    def __init__(self, n_tokens: int | None, side: str | None) -> None:
        self.n_tokens = n_tokens
        self.left = side == "left"

    def limit(self, source: VectorSource) -> int | None:
        """Return the most tokens of a prompt; None: no truncation. Raises ApiError (400)."""
        if self.n_tokens is None or self.n_tokens == -1:
            return None if self.n_tokens is None else source.max_tokens
        if self.n_tokens > source.max_tokens:
            raise invalid(
                f"truncate_prompt_tokens is {self.n_tokens}, a prompt may have "
                f"{source.max_tokens} tokens",
                "truncate_prompt_tokens",
            )
        return self.n_tokens

    def of_chat(self, prompt: Prompt, source: VectorSource) -> list[Prompt]:
        """Truncate the prompt of a chat, unless it has images. Raises ApiError (400)."""
        if not prompt.images:
            return self.apply([prompt.ids], source, "messages")
        if self.n_tokens is not None:
            raise invalid(
                "a chat with images is not truncated; leave truncate_prompt_tokens out",
                "truncate_prompt_tokens",
            )
        self.apply([prompt.ids], source, "messages")  # refuses what is too long
        return [prompt]

    def apply(self, prompts: Sequence[Ids], source: VectorSource, param: str) -> list[Prompt]:
        """Truncate the prompts. Raises ApiError (400) for empty and for overlong prompts."""
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
                    f"{where} has {len(ids)} tokens. This model's maximum context length is "
                    f"{source.max_tokens} tokens ({source.model}); shorten the text or set "
                    "truncate_prompt_tokens",
                    param,
                    "context_length_exceeded",
                )
        return [Prompt(ids) for ids in prompts]


class AdapterVectors(VectorSource):
    """Vectors of the base through an adapter."""

    def __init__(
        self,
        state: AppState,
        info: RequestInfo,
        resolved: ResolvedAdapter,
        requested: AdapterRequest,
        *,
        call_id: str,
        cache_salt: str | None,
        load_s: float,
        prompt_param: str,
    ) -> None:
        """Takes over the lease of ``resolved``."""
        plan = None if resolved.lease is None else resolved.lease.plan
        prefix = None if plan is None else plan.prefix
        self.model = requested.model
        self.adapter = resolved.to_json()
        self.label = f"adapter {resolved.label!r}" if resolved.lease else "the base model"
        self.adapter_param = requested.param
        self.head = resolved.head or state.model.head
        self.pooling = (None if plan is None else plan.pooling) or state.model.embedding_pooling
        self.max_tokens = state.engine.max_model_len - (0 if prefix is None else prefix.n_virtual)
        self.width = state.store.base.hidden_size
        images = state.model.image_encoder
        if images is not None and images.similarity is not None:
            self.max_tokens = min(self.max_tokens, images.max_text_tokens)
            self.width = state.store.base.feature_size
        self.digest = "" if resolved.lease is None else resolved.lease.digest
        self._state, self._info, self._resolved = state, info, resolved
        self._call_id, self._load_s, self._prompt_param = call_id, load_s, prompt_param
        self._salt = f"{info.tenant}/{cache_salt or ''}".strip("/")
        self._batch: VectorBatch | None = None

    async def encode(
        self, texts: Sequence[str], *, param: str, special: bool, cut: Cut
    ) -> list[Prompt]:
        if not self._state.model.writes_text and special:
            whole = await self._encode_whole(texts, param, cut)
            return self._padded(cut.apply([text.ids for text in whole], self, param))
        encoded = await self._state.text.encode_many(
            texts, add_special_tokens=special, param=param, tenant=self._info.tenant
        )
        return cut.apply(encoded, self, param)

    async def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, param: str, cut: Cut
    ) -> list[Prompt]:
        if not self._state.model.writes_text:
            whole = await self._encode_whole(pairs, param, cut)
            cut.apply([pair.ids for pair in whole], self, param)  # refuses what is too long
            return [Prompt(pair.ids, pair.second_text_at) for pair in whole]
        encoded = await self._state.text.encode_many(pairs, param=param, tenant=self._info.tenant)
        return cut.apply(encoded, self, param)

    async def encode_images(self, images: Sequence[str], *, param: str) -> list[Prompt]:
        reader, limits = self._state.model.image_encoder, self._state.config.http.image_limits
        assert reader is not None  # ``Inputs`` refuses images to other bases
        prompts = []
        try:
            for image in images:  # those of other tenants go between two
                work = partial(reader.read, image, limits)
                pixels, n_rows = await self._state.pools.images.run(self._info.tenant, work)
                prompts.append(Prompt.of_image(pixels, n_rows))
        except ImageRefused as error:
            where = param if len(images) == 1 else f"{param}, image {len(prompts)}"
            raise from_image(error, param, where) from error
        return prompts

    def _padded(self, prompts: list[Prompt]) -> list[Prompt]:
        """Return texts of the length that the base was trained with, if it reads padding."""
        images = self._state.model.image_encoder
        if images is None:
            return prompts
        pad = self._state.model.tokenizer.pad_token_id or 0
        return [replace(each, ids=images.padded(each.ids, pad)) for each in prompts]

    async def _encode_whole(
        self, texts: Sequence[str] | Sequence[tuple[str, str]], param: str, cut: Cut
    ) -> list[EncodedText]:
        """Encode texts of an encoder. Truncation keeps the special tokens at their ends."""
        return await self._state.text.encode_whole(
            texts,
            max_tokens=cut.limit(self),
            cut_left=cut.left,
            param=param,
            tenant=self._info.tenant,
        )

    async def encode_chat(self, chat: ChatPrompt) -> Prompt:
        sources = ImageSources(self._state, self._info.tenant)
        shown = AdapterChat(chat, self._state.text, self._resolved, self._info.tenant, sources)
        await shown.read_images()
        ids = await shown.ids()
        return Prompt(ids, images=shown.images_in(ids))

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        self._state.text.check_ids(ids, param)

    async def read(self, prompts: Sequence[Prompt], pooling: Pooling) -> list[Tensor]:
        assert self._batch is None
        requests = [
            GenerationRequest(
                request_id=f"{self._call_id}-{index}",
                prompt_ids=prompt.ids,
                sampling=_NO_SAMPLING,
                adapter=self._resolved.lease,
                cache_salt=self._salt,
                share=self._info.share,
                pooling=pooling,
                second_text_at=prompt.second_text_at,
                pixels=prompt.pixels,
                images=prompt.images,
            )
            for index, prompt in enumerate(prompts)
        ]
        n_prompt = sum(map(len, prompts))
        state, info = self._state, self._info
        assert info.record is not None
        metrics = CallMetrics(
            state.metrics,
            info.record,
            adapter=self._resolved.metrics_label,
            load_s=self._load_s,
            n=len(requests),
            max_tokens=0,
            n_prompt=n_prompt,
        )
        context = CallContext(
            state.engine, state.live, self._resolved, info.meter, metrics, self._prompt_param
        )
        batch = self._batch = VectorBatch(context, requests)
        info.n_prompt_tokens, info.n_output_tokens = n_prompt, 0
        vectors: dict[int, Tensor] = {}
        async for index, pooled in batch.results():
            vectors[index] = pooled
        return [vectors[index] for index in range(len(requests))]

    def close(self) -> None:
        if self._batch is None:
            self._resolved.release()
        else:
            self._batch.close()


class EncoderVectors(VectorSource):
    """Vectors of the sentence encoder, which are the mean over a text's tokens."""

    def __init__(self, state: AppState, info: RequestInfo, encoder: EncoderModel) -> None:
        self.model = self.label = encoder.name
        self.adapter_param = "model"
        self.max_tokens = encoder.max_tokens
        self.pooling = PoolingPlan(PoolingMode.MEAN, normalize=True)
        self._state, self._info, self._encoder = state, info, encoder

    async def encode(
        self, texts: Sequence[str], *, param: str, special: bool, cut: Cut
    ) -> list[Prompt]:
        if not special:
            raise invalid(f"{self.model} always reads its special tokens", "add_special_tokens")
        limit = cut.limit(self)
        for text in texts:
            if len(text) > self.max_tokens * _ENCODER_CHARS:
                raise invalid(
                    f"{len(text):,} characters cannot fit; {self.model} reads at most "
                    f"{self.max_tokens * _ENCODER_CHARS:,}",
                    param,
                    "context_length_exceeded",
                )

        def tokenize(texts: Sequence[str]) -> list[Ids]:
            model = self._encoder.shared.get()
            encoded = model.tokenize(texts, max_tokens=limit, cut_left=cut.left)
            return [tuple(ids) for ids in encoded]

        return cut.apply(await self._in_pieces(texts, tokenize, _PIECE_CHARS), self, param)

    async def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, param: str, cut: Cut
    ) -> list[Prompt]:
        raise invalid(f"{self.model} reads one text at a time", param)

    async def encode_images(self, images: Sequence[str], *, param: str) -> list[Prompt]:
        raise invalid(f"{self.model} reads texts, and no images", param, "base_reads_no_images")

    async def encode_chat(self, chat: ChatPrompt) -> Prompt:
        raise invalid(f"{self.model} takes texts, not messages", "messages")

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        raise invalid(f"{self.model} takes texts, not token ids", param)

    async def read(self, prompts: Sequence[Prompt], pooling: Pooling) -> list[Tensor]:
        if pooling.mode is not PoolingMode.MEAN:
            raise invalid(f"{self.model} makes one vector for a text, not for each token", "task")
        n_prompt = sum(map(len, prompts))
        if self._info.meter is not None:
            await self._info.meter.reserve_tokens(n_prompt)
        self._info.n_prompt_tokens, self._info.n_output_tokens = n_prompt, 0
        return await self._in_pieces([each.ids for each in prompts], self._means, _PIECE_TOKENS)

    def _means(self, ids: Sequence[Ids]) -> list[Tensor]:
        return list(self._encoder.shared.get().means(ids))

    def close(self) -> None:
        return None

    async def _in_pieces(
        self, inputs: Sequence[S], work: Callable[[Sequence[S]], Sequence[T]], size: int
    ) -> list[T]:
        """Run ``work`` on pieces of the inputs, on the encoder's thread. Return all results."""
        encoder, tenant = self._state.pools.encoder, self._info.access.tenant
        results: dict[int, T] = {}
        for piece in pieces([len(one) for one in inputs], size):
            part = [inputs[index] for index in piece]
            results |= zip(piece, await encoder.run(tenant, partial(work, part)), strict=True)
        return [results[index] for index in range(len(inputs))]
