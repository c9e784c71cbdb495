"""Runs the texts and images of a step through an encoder: each one whole, without a KV cache.

A step's rows, segments and adapters are those of a decoder's step. What follows differs: nothing is
sampled, and the layers of the features run once more on one row for each text or image. The texts
of a step and its images run after each other, since each have a tower of their own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.formats.host_copy import move_together
from loraplex_server.engine.adapters.device_pool import DevicePool
from loraplex_server.engine.memory.device import release_cached_memory, use_device
from loraplex_server.engine.memory.kv_cache import KvCache
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.model.encoder.encoder import Encoder, Tower, TowerInputs
from loraplex_server.model.encoder.text_attention import text_groups

from .adapter_rows import AdapterRows
from .forward_batch import ForwardBatch, build_batch
from .step_runner import StartedStep, StepResult, StepRunner


class EncoderRunner(StepRunner):
    """The runner of an encoder."""

    def __init__(self, model: Encoder, kv_cache: KvCache, adapters: DevicePool) -> None:
        """``kv_cache`` has no layers: its pages only count the tokens of running requests."""
        self._model, self._kv = model, kv_cache
        model.attach_pool(adapters.pool)
        self._adapters = AdapterRows(adapters, model.device)

    def warm_up(self, max_rows: int) -> None:
        use_device(self._model.device)

    @torch.inference_mode()
    def start(
        self, chunks: Sequence[ScheduledChunk], previous: StartedStep | None = None
    ) -> StartedStep:
        """Run a step and wait for it: vectors are read on the host."""
        return StartedStep((), (), {}, self._vectors(chunks))

    def finish(self, step: StartedStep) -> StepResult:
        return StepResult({}, step.prompt_logprobs, step.pooled)

    def release_cached_memory(self) -> None:
        release_cached_memory(self._model.device)

    @torch.inference_mode()
    def probe(self) -> None:
        model, step = self._model, self._model.step
        modality, inputs = model.probe_inputs()
        rows = torch.arange(len(inputs.token_ids), device=model.device)
        step.positions, step.texts = rows, (rows.unsqueeze(0),)
        step.clear_adapters()
        model.towers[modality].forward(inputs).cpu()

    def _vectors(self, chunks: Sequence[ScheduledChunk]) -> dict[str, Tensor]:
        """Return the rows that each request pools: all its hidden states, or its features."""
        vectors: dict[str, Tensor] = {}
        for modality, tower in self._model.towers.items():
            read = [chunk for chunk in chunks if chunk.request.source.modality is modality]
            if read:
                vectors |= self._vectors_of(tower, read)
        return vectors

    def _vectors_of(self, tower: Tower, chunks: Sequence[ScheduledChunk]) -> dict[str, Tensor]:
        digests = [chunk.adapter_digest for chunk in chunks]
        n_rows = [chunk.n_tokens for chunk in chunks]
        own_rows = self._adapters.own_rows(digests, n_rows)
        batch = build_batch(
            chunks,
            self._kv,
            self._model.device,
            slots=None
            if self._model.device.type == "cpu"
            else [self._adapters.slot(digest) for digest in digests],
            own_rows=own_rows,
        )
        hidden, features = self._forward(tower, batch, chunks, digests, own_rows)
        of_requests = self._features(tower, batch, chunks, hidden)
        if len(of_requests) == len(chunks):  # so no hidden state is copied to the host
            return of_requests
        hidden = hidden.float().cpu()
        vectors: dict[str, Tensor] = {}
        for chunk, rows in zip(chunks, batch.chunk_rows, strict=True):
            request, pooling = chunk.request, chunk.request.source.pooling
            if request.id in of_requests:
                vectors[request.id] = of_requests[request.id]
            elif pooling is not None and pooling.head is not None and features is not None:
                vectors[request.id] = features[rows]
            else:
                vectors[request.id] = hidden[rows]
        return vectors

    def _forward(
        self,
        tower: Tower,
        batch: ForwardBatch,
        chunks: Sequence[ScheduledChunk],
        digests: Sequence[str],
        own_rows: Mapping[str, Sequence[int]],
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states, and all rows' features if token classes depend on them."""
        device, step = self._model.device, self._model.step
        batch.bind(step)
        self._adapters.bind(step, digests, batch, own_rows)
        step.texts = text_groups([chunk.n_tokens for chunk in chunks], device)
        sources = [chunk.request.source for chunk in chunks]
        images = tuple(each.pixels.to(device) for each in sources if each.pixels is not None)
        types = _token_types(chunks, device)
        hidden = tower.forward(TowerInputs(batch.token_ids, types, images))
        if tower.classifies_tokens_by_features and any(map(_classifies_tokens, chunks)):
            return hidden, tower.features(hidden).float().cpu()
        return hidden, None

    def _features(
        self,
        tower: Tower,
        batch: ForwardBatch,
        chunks: Sequence[ScheduledChunk],
        hidden: Tensor,
    ) -> dict[str, Tensor]:
        """Return the features [1, n_features] of each request for its class or its embedding."""
        step = self._model.step
        asked = [
            (chunk.request, rows)
            for chunk, rows in zip(chunks, batch.chunk_rows, strict=True)
            if _asks_features(tower, chunk)
        ]
        if not asked:
            return {}
        requests = [request for request, _ in asked]
        step.clear_adapters()
        step.positions = step.positions[: len(requests)]
        step.segments, step.fallback = self._adapters.of_each(requests)
        pooled = [tower.pooled(hidden[rows], batch.token_ids[rows]) for _, rows in asked]
        features = tower.features(torch.stack(pooled)).float().cpu()
        return {r.id: features[i : i + 1] for i, r in enumerate(requests)}


def _asks_features(tower: Tower, chunk: ScheduledChunk) -> bool:
    """Return True if the request asks for the class or the embedding of the whole input."""
    pooling = chunk.request.source.pooling
    if pooling is None or pooling.mode is None:
        return False
    return pooling.head is not None or tower.embeds_features


def _classifies_tokens(chunk: ScheduledChunk) -> bool:
    pooling = chunk.request.source.pooling
    return pooling is not None and pooling.head is not None and pooling.mode is None


def _token_types(chunks: Sequence[ScheduledChunk], device: torch.device) -> Tensor:
    """Return int64 [T]: 1 from the second text of a pair on."""
    types = [
        np.arange(chunk.n_tokens) >= chunk.request.source.second_text_at
        if chunk.request.source.second_text_at is not None
        else np.zeros(chunk.n_tokens, dtype=bool)
        for chunk in chunks
    ]
    (on_device,) = move_together([np.concatenate(types).astype(np.int64)], device)
    return on_device
