"""Runs the chunks of a step through the model: inputs, embeddings, layers and sampling."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.formats.host_copy import move_together
from loraplex_kernels.layers.flashinfer_attention import FlashInferAttention
from loraplex_kernels.lora.native_decoder import LogitsRows
from loraplex_server.engine.adapters.device_pool import DevicePool
from loraplex_server.engine.adapters.layer_kind import LayerKind
from loraplex_server.engine.drafts.row_cost import MAX_ROWS
from loraplex_server.engine.memory.device import release_cached_memory, use_device
from loraplex_server.engine.memory.kv_cache import KvCache
from loraplex_server.engine.requests.client import LostAtStart
from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.engine.sampling.sampler import Sampled, SampledRows
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.model.base_model import BaseModel

from .adapter_rows import AdapterRows
from .forward_batch import ForwardBatch, FutureTokens, GraphBuffers, build_batch
from .image_rows import ImageRows
from .kernel_warm_up import failing_function, run_every_size
from .output_head import OutputHead
from .step_graphs import StepGraphs
from .step_mode import StepMode
from .step_parts import StepPart, parts_of
from .step_runner import StartedStep, StepResult, StepRunner

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """The results of one forward."""

    last: Tensor | None  # hidden states of the rows that get a token, in the order of the chunks
    pooled: dict[str, Tensor]
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]


class ModelRunner(StepRunner):
    """Owner of the step buffers and of the model. Engine thread only."""

    def __init__(
        self,
        model: BaseModel,
        kv_cache: KvCache,
        adapters: DevicePool,
        mode: StepMode = StepMode(),  # noqa: B008  frozen value
        flashinfer: FlashInferAttention | None = None,
        *,
        max_captured_tokens: int = 0,  # of captured steps with prompt chunks
    ) -> None:
        self._model = model
        self._flashinfer = flashinfer
        self._kv = kv_cache
        model.attach_kv(kv_cache.keys, kv_cache.values)
        model.attach_pool(adapters.pool)
        self._adapters = AdapterRows(adapters, model.device)
        self._images = None if model.images is None else ImageRows(model.images, self._adapters)
        self._head = OutputHead(
            model,
            self._adapters,
            n_rows=max(kv_cache.page_table.shape[0], MAX_ROWS),
            overlaps=mode.overlaps,
        )
        self.lost_at_start: tuple[LostAtStart, ...] = ()
        self._graphs: StepGraphs | None = None
        layers, gates = model.fused, adapters.gate_tables
        if mode.capture is not None and layers is not None and gates is not None:
            self._graphs = StepGraphs(
                model,
                layers,
                kv_cache,
                adapters.pool,
                gates,
                mode.capture,
                max_mixed_rows=max_captured_tokens,
                flashinfer=flashinfer,
            )

    def warm_up(self, max_rows: int) -> None:
        """Compiles kernels and captures graphs on a GPU. The first call on the engine thread.

        ``max_rows``: most tokens of a step. A kernel that fails costs its kind of layers its
        graphs, never the start of the server: ``lost_at_start`` has the failures.
        """
        device = self._model.device
        use_device(device)
        if device.type != "cpu":
            n_requests, n_pages = self._kv.page_table.shape
            n_pages = max(n_pages, -(-max_rows // self._kv.page_size))
            for kind in LayerKind:
                with self._losing("kernels", kind):
                    run_every_size(
                        self._model,
                        kind,
                        max_rows=max_rows,
                        max_requests=n_requests,
                        n_pages=n_pages,
                    )
            release_cached_memory(device)
        if self._graphs is not None:
            for kind in LayerKind:
                with self._losing("graphs", kind):
                    self._graphs.capture(kind)
            release_cached_memory(device)

    @contextlib.contextmanager
    def _losing(self, what: str, kind: LayerKind) -> Iterator[None]:
        """Turns an error of the device or of a compiler into an entry of ``lost_at_start``."""
        try:
            yield
        except Exception as error:
            problem = f"{failing_function(error)}: {type(error).__name__}"
            lost = LostAtStart(what, kind.name.lower(), problem)
            self.lost_at_start += (lost,)
            _log.warning("no %s for %s layers: %s: %s", what, lost.layers, problem, error)

    def run(self, chunks: Sequence[ScheduledChunk]) -> StepResult:
        """Run a step and wait for its results."""
        return self.finish(self.start(chunks))

    @torch.inference_mode()
    def start(
        self, chunks: Sequence[ScheduledChunk], previous: StartedStep | None = None
    ) -> StartedStep:
        """Launch a step. On a GPU it waits only for vectors and prompt log-probabilities.

        ``previous``: the step that computes the tokens of placeholders.
        """
        parts = parts_of(chunks, self._adapters, self._graphs)
        generating = [
            state
            for part in parts
            for chunk in part.chunks
            if chunk.request.source.pooling is None
            for state in chunk.generating
        ]
        self._head.masks.start(generating)
        results = [self._forward(part, previous) for part in parts]
        tokens: SampledRows | tuple[Sampled, ...] = ()
        if generating:
            last = [result.last for result in results if result.last is not None]
            tokens = self._head.sample(last[0] if len(last) == 1 else torch.cat(last), generating)
        return StartedStep(
            tuple(generating),
            tokens,
            {id: entries for result in results for id, entries in result.prompt_logprobs.items()},
            {id: rows for result in results for id, rows in result.pooled.items()},
        )

    @torch.inference_mode()
    def finish(self, step: StartedStep) -> StepResult:
        """Wait for a step's tokens. Raises the device's errors, and RankLost if a rank is gone."""
        tokens = step.tokens if isinstance(step.tokens, tuple) else step.tokens.wait()
        shard = self._model.shard
        if shard is not None and shard.others is not None:
            shard.others.check()
        sampled: dict[str, list[Sampled]] = {}
        for request, token in zip(step.generating, tokens, strict=True):
            sampled.setdefault(request.id, []).append(token)
        return StepResult(sampled, step.prompt_logprobs, step.pooled)

    def release_cached_memory(self) -> None:
        """Frees torch's cached memory after a step ran out of memory. Waits for the device."""
        release_cached_memory(self._model.device)

    @torch.inference_mode()
    def probe(self) -> None:
        """Runs one row of the base without writing KV. Raises the device's error if it fails."""
        model, step = self._model, self._model.step
        zero = torch.zeros(1, dtype=torch.int64, device=model.device)
        batch = ForwardBatch(
            token_ids=zero,
            positions=zero,
            slot_mapping=zero - 1,  # nowhere
            page_table=zero.int().unsqueeze(0),
            query_starts=torch.tensor([0, 1], dtype=torch.int32, device=model.device),
            kv_lens=zero.int() + 1,
            chunk_rows=(),
            virtual_rows=(),
        )
        batch.bind(step)
        step.clear_adapters()
        model.head.packed(model.forward(model.embed(zero))).cpu()

    def _forward(self, part: StepPart, previous: StartedStep | None) -> _Forwarded:
        chunks, is_eager = part.chunks, part.buffers is None
        requests = [chunk.request for chunk in chunks]
        digests = [chunk.adapter_digest for chunk in chunks]
        n_rows = [chunk.n_rows for chunk in chunks]
        own_rows = self._adapters.own_rows(digests, n_rows, at_ends_alone=not is_eager)
        batch = self._build_batch(part, own_rows, previous)
        wants_all = any(request.source.reads_all_rows for request in requests)
        last = batch.sampling_rows  # the rows that get logits; None: every row
        if part.buffers is None:
            hidden = self._run_eagerly(batch, chunks, own_rows, None if wants_all else last)
        else:
            hidden = self._replay(batch, part, part.buffers, own_rows)
        has_last_only = is_eager and not wants_all
        x = hidden if has_last_only or last is None else hidden[last]
        prompt_logprobs = {}
        if wants_all:
            prompt_logprobs = {
                chunk.request.id: self._head.prompt_logprobs(hidden, chunk, rows)
                for chunk, rows in zip(chunks, batch.chunk_rows, strict=True)
                if chunk.request.source.sampling.prompt_logprobs is not None
            }
        pooled = _pooled(x, hidden if wants_all else None, chunks, batch)
        generates = [c.request.source.pooling is None for c in chunks for _ in c.generating]
        if not any(generates):
            return _Forwarded(None, pooled, prompt_logprobs)
        if not all(generates):
            (rows,) = move_together([np.flatnonzero(generates)], x.device)
            x = x.index_select(0, rows)
        return _Forwarded(x, pooled, prompt_logprobs)

    def _run_eagerly(
        self,
        batch: ForwardBatch,
        chunks: Sequence[ScheduledChunk],
        own_rows: Mapping[str, Sequence[int]],
        last: Tensor | None,
    ) -> Tensor:
        """Return the hidden states of rows ``last``, or of all rows for None."""
        step, digests = self._model.step, [chunk.adapter_digest for chunk in chunks]
        batch.bind(step)
        self._adapters.bind(step, digests, batch, own_rows)
        if last is not None:
            segments = None
            if last.is_cpu:  # only native code reads these segments
                sampling = [chunk for chunk in chunks if chunk.samples]
                segments = self._adapters.segments(
                    [chunk.adapter_digest for chunk in sampling],
                    [len(chunk.generating) for chunk in sampling],
                )
            step.logits_rows = LogitsRows(last, segments)
        return self._model.forward(self._embed(batch, chunks))

    def _replay(
        self,
        batch: ForwardBatch,
        part: StepPart,
        buffers: GraphBuffers,
        own_rows: Mapping[str, Sequence[int]],
    ) -> Tensor:
        """Return the hidden states of all rows, valid until the next replay."""
        assert self._graphs is not None
        self._adapters.bind_embedding(self._model.step, own_rows, batch.own_rows)
        hidden = self._graphs.run(part.kind, batch, buffers, self._embed(batch, part.chunks))
        return hidden[: batch.chunk_rows[-1].stop]

    def _build_batch(
        self, part: StepPart, own_rows: Mapping[str, Sequence[int]], previous: StartedStep | None
    ) -> ForwardBatch:
        device, buffers = self._model.device, part.buffers
        needs_slots = device.type != "cpu" or buffers is not None
        return build_batch(
            part.chunks,
            self._kv,
            device,
            slots=[self._adapters.slot(c.adapter_digest) for c in part.chunks]
            if needs_slots
            else None,
            own_rows=own_rows,
            buffers=buffers,
            future=_future_tokens(part.chunks, previous),
            flashinfer=self._flashinfer,
        )

    def _embed(self, batch: ForwardBatch, chunks: Sequence[ScheduledChunk]) -> Tensor:
        embeddings = self._model.embed(batch.token_ids)
        for row, request, index in batch.virtual_rows:
            embedded = self._adapters.prefix_embeddings(request)
            if embedded is not None:
                embeddings[row] = embedded[index]
        if self._images is not None:
            self._images.put(embeddings, chunks, batch.chunk_rows)
        return embeddings


def _pooled(
    last: Tensor, hidden: Tensor | None, chunks: Sequence[ScheduledChunk], batch: ForwardBatch
) -> dict[str, Tensor]:
    """Return the rows of requests for vectors, by id.

    ``last``: the rows that sample. ``hidden``: all rows; None if no request
    needs them.
    """
    pooled: dict[str, Tensor] = {}
    n_ended = 0
    for chunk, rows in zip(chunks, batch.chunk_rows, strict=True):
        request, pooling = chunk.request, chunk.request.source.pooling
        n_ended += len(chunk.generating)
        if pooling is None:
            continue
        if not pooling.reads_all_rows:
            if chunk.samples:
                pooled[request.id] = last[n_ended - 1 : n_ended].float().cpu()
            continue
        assert hidden is not None
        n_virtual = max(0, request.n_virtual - chunk.start)  # rows of the adapter's prefix
        pooled[request.id] = hidden[rows.start + n_virtual : rows.stop].float().cpu()
    return pooled


def _future_tokens(
    chunks: Sequence[ScheduledChunk], previous: StartedStep | None
) -> FutureTokens | None:
    """Return the rows whose tokens are still on the device."""
    if previous is None or isinstance(previous.tokens, tuple):
        return None
    index = {id(request): i for i, request in enumerate(previous.generating)}
    rows, sources, end = [], [], 0
    for chunk in chunks:
        end += chunk.n_rows
        if chunk.request.has_placeholder and chunk.samples:
            rows.append(end - 1)
            sources.append(index[id(chunk.request)])
    return FutureTokens(previous.tokens.ids, rows, sources) if rows else None
