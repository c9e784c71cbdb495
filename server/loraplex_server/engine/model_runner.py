"""Runs the chunks of a step through the model: segments, embeddings, layers, logits, sampling."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.decoder import LogitsRows
from loraplex_kernels.flashinfer_attention import FlashInferAttention
from loraplex_kernels.side_stream import SideStream
from loraplex_server.model.base_model import BaseModel

from .adapter_rows import AdapterRows
from .device import release_cached_memory, use_device
from .device_pool import DevicePool
from .device_sampler import DeviceSampler, SampledRows
from .events import TokenLogprobs
from .forward_batch import FedTokens, FixedPlace, ForwardBatch, build_batch
from .graph_recorder import Recorder
from .host_copy import move_together
from .kernel_warm_up import run_every_size
from .kv_cache import KvCache
from .layer_kind import LayerKind
from .pool_binding import bind_pool
from .request import Request
from .row_buffer import RowBuffer
from .sampler import Sampled, forced_token, is_plainly_greedy, prompt_logprobs_of, sample
from .scheduler import ScheduledChunk
from .step_graphs import StepGraphs
from .step_parts import StepPart, parts_of
from .token_masks import TokenMasks

__all__ = ["ModelRunner", "StartedStep", "StepResult"]

_log = logging.getLogger(__name__)
_LOGPROB_ROWS = 64  # of a prompt, whose logits take memory at once


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found out, by request id."""

    sampled: dict[str, Sampled]
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]  # of the chunk's tokens after the first
    pooled: dict[str, Tensor]  # hidden states float32 [n, hidden_size], see ``PooledRows.add``


@dataclass(frozen=True, slots=True)
class StartedStep:
    """A step that the device has got, and perhaps still computes."""

    generating: tuple[Request, ...]  # that get a token each
    tokens: SampledRows | tuple[Sampled, ...]  # theirs, in this order; known already on a CPU
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]
    pooled: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """What one forward found."""

    last: Tensor | None  # hidden states of the rows that get a token, in the order of the chunks
    pooled: dict[str, Tensor]
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]


class ModelRunner:
    """Owner of the step buffers and of the model. Engine thread only."""

    def __init__(
        self,
        model: BaseModel,
        kv_cache: KvCache,
        adapters: DevicePool,
        recorder: Recorder | None = None,  # of steps, see ``step_graphs``
        side: SideStream | None = None,  # for shrinks, beside the base's products
        flashinfer: FlashInferAttention | None = None,  # where attention is not recorded
        *,
        max_recorded_tokens: int = 0,  # of steps with prompt chunks that are recorded
    ) -> None:
        self._model = model
        self._flashinfer = flashinfer
        self._kv = kv_cache
        n_rows = kv_cache.page_table.shape[0]
        self._raw_logits = RowBuffer(n_rows, model.vocab_size, model.dtype, model.device)
        self._float_logits = RowBuffer(n_rows, model.vocab_size, torch.float32, model.device)
        self._masks = TokenMasks(n_rows, model.vocab_size)
        self._device_sampler = (
            DeviceSampler(model.vocab_size, model.eos_token_ids, model.device)
            if model.device.type != "cpu"
            else None
        )
        model.attach_kv(kv_cache.keys, kv_cache.values)
        bind_pool(model.groups.values(), adapters.pool, side)
        projections = {name for group in model.groups.values() for name in group.module_names}
        self._adapters = AdapterRows(adapters, frozenset(projections), model.device)
        self._graphs: StepGraphs | None = None
        layers, tables = model.layers_in_pieces, adapters.slot_tables
        if recorder is not None and layers is not None and tables is not None:
            self._graphs = StepGraphs(
                model,
                layers,
                kv_cache,
                adapters.pool,
                tables,
                recorder,
                max_mixed_rows=max_recorded_tokens,
            )

    def warm_up(self, max_rows: int) -> None:
        """First of all on the engine thread. ``max_rows``: of a step.

        On a GPU kernels are compiled, and steps recorded where that is asked for.
        """
        device = self._model.device
        use_device(device)
        if device.type != "cpu":
            n_requests, n_pages = self._kv.page_table.shape
            n_pages = max(n_pages, -(-max_rows // self._kv.page_size))
            run_every_size(self._model, max_rows=max_rows, max_requests=n_requests, n_pages=n_pages)
            release_cached_memory(device)
        if self._graphs is None:
            return
        try:
            self._graphs.record_all()
        except Exception as error:
            self._disable_cuda_graphs(error)
        release_cached_memory(device)

    def run(self, chunks: Sequence[ScheduledChunk]) -> StepResult:
        """One forward over all chunks; samples for those that reach their last token."""
        return self.finish(self.start(chunks))

    @torch.inference_mode()
    def start(
        self, chunks: Sequence[ScheduledChunk], behind: StartedStep | None = None
    ) -> StartedStep:
        """Gives the step to the device. On a GPU it does not wait, unless vectors or
        log-probabilities of prompts are asked for.

        ``behind``: the step that finds the tokens which some of the requests expect.
        """
        planned = parts_of(chunks, self._adapters, self._graphs)
        generating = [
            chunk.request
            for part in planned
            for chunk in part.chunks
            if chunk.samples and chunk.request.source.pooling is None
        ]
        self._masks.start(generating)
        parts = [self._forward(part, behind) for part in planned]
        tokens: SampledRows | tuple[Sampled, ...] = ()
        if generating:
            last = [part.last for part in parts if part.last is not None]
            tokens = self._sample(last[0] if len(last) == 1 else torch.cat(last), generating)
        return StartedStep(
            tuple(generating),
            tokens,
            {id: found for part in parts for id, found in part.prompt_logprobs.items()},
            {id: found for part in parts for id, found in part.pooled.items()},
        )

    @torch.inference_mode()
    def finish(self, step: StartedStep) -> StepResult:
        """Waits for the tokens of a step. Raises what the device raises, and RankLost if another
        rank was gone before they came."""
        tokens = step.tokens if isinstance(step.tokens, tuple) else step.tokens.wait()
        shard = self._model.shard
        if shard is not None and shard.others is not None:
            shard.others.check()
        sampled = {r.id: token for r, token in zip(step.generating, tokens, strict=True)}
        return StepResult(sampled, step.prompt_logprobs, step.pooled)

    def release_cached_memory(self) -> None:
        """After a step that found too little memory. Waits for the device."""
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

    def _disable_cuda_graphs(self, error: Exception) -> None:
        """The device's error or a compiler's: without graphs all still works."""
        _log.warning("steps run without CUDA graphs: %s", error)
        self._graphs = None

    def _forward(self, part: StepPart, behind: StartedStep | None) -> _Forwarded:
        chunks = part.chunks
        own_rows = self._own_rows(part)
        batch = self._lay_out(part, own_rows, behind)
        wants_all = any(c.request.source.reads_all_rows for c in chunks)
        last = batch.sampling_rows  # the rows that get logits; None: each does
        if part.place is None:
            hidden = self._run_freely(batch, chunks, own_rows, None if wants_all else last)
        else:
            hidden = self._replay(batch, part.kind, part.place, own_rows)
        is_kept = part.place is None and not wants_all  # hidden has the last rows alone
        x = hidden if is_kept or last is None else hidden[last]
        found = self._prompt_logprobs(hidden, chunks, batch) if wants_all else {}
        pooled = _pooled(x, hidden if wants_all else None, chunks, batch)
        is_wanted = [c.request.source.pooling is None for c in chunks if c.samples]
        if not any(is_wanted):
            return _Forwarded(None, pooled, found)
        if not all(is_wanted):
            (rows,) = move_together([np.flatnonzero(is_wanted)], x.device)
            x = x.index_select(0, rows)
        return _Forwarded(x, pooled, found)

    def _own_rows(self, part: StepPart) -> dict[str, list[int]]:
        requests = [chunk.request for chunk in part.chunks]
        n_rows = [chunk.n_tokens for chunk in part.chunks]
        return self._adapters.own_rows(requests, n_rows, at_ends_alone=part.place is not None)

    def _run_freely(
        self,
        batch: ForwardBatch,
        chunks: Sequence[ScheduledChunk],
        own_rows: Mapping[str, Sequence[int]],
        last: Tensor | None,
    ) -> Tensor:
        """Hidden states of rows ``last``; None = of all."""
        step, requests = self._model.step, [chunk.request for chunk in chunks]
        batch.bind(step)
        n_rows = [chunk.n_tokens for chunk in chunks]
        of_step = batch.row_slots, own_rows, batch.own_rows
        self._adapters.bind(step, requests, n_rows, *of_step)
        if last is not None:
            on_cpu = last.is_cpu  # only native code reads the segments
            sampling = [chunk.request for chunk in chunks if chunk.samples]
            each = [1] * len(sampling)
            segments = self._adapters.segments(sampling, each) if on_cpu else None
            step.logits_rows = LogitsRows(last, segments)
        return self._model.forward(self._embed(batch))

    def _replay(
        self,
        batch: ForwardBatch,
        kind: LayerKind,
        place: FixedPlace,
        own_rows: Mapping[str, Sequence[int]],
    ) -> Tensor:
        """Hidden states of all rows; valid until the next replay."""
        assert self._graphs is not None
        self._adapters.bind_embedding(self._model.step, own_rows, batch.own_rows)
        hidden = self._graphs.run(kind, batch, place, self._embed(batch))
        return hidden[: batch.chunk_rows[-1].stop]

    def _lay_out(
        self, part: StepPart, own_rows: Mapping[str, Sequence[int]], behind: StartedStep | None
    ) -> ForwardBatch:
        device, place = self._model.device, part.place
        needs_slots = device.type != "cpu" or place is not None
        return build_batch(
            part.chunks,
            self._kv,
            device,
            slots=[self._adapters.slot(c.request) for c in part.chunks] if needs_slots else None,
            own_rows=own_rows,
            place=place,
            fed=_fed_tokens(part.chunks, behind),
            flashinfer=None if place is not None and place.pads_requests else self._flashinfer,
        )

    def _embed(self, batch: ForwardBatch) -> Tensor:
        embeddings = self._model.embed(batch.token_ids)
        for row, request, index in batch.virtual_rows:
            embedded = self._adapters.prefix_embeddings(request)
            if embedded is not None:
                embeddings[row] = embedded[index]
        return embeddings

    def _sample(self, x: Tensor, requests: Sequence[Request]) -> SampledRows | tuple[Sampled, ...]:
        """A token of each row of ``x`` [n, hidden_size], normed."""
        if self._can_argmax(requests) and (tokens := self._argmax(x, requests)) is not None:
            return tokens
        logits, masks = self._finish(self._raw_logits_of(x, requests)), self._masks.wait()
        if self._device_sampler is not None:
            return self._device_sampler.start(logits, requests, masks)
        return tuple(sample(logits, requests, self._model.eos_token_ids, masks))

    def _argmax(self, x: Tensor, requests: Sequence[Request]) -> tuple[Sampled, ...] | None:
        """None where a row has no token: ``sample`` says which and why."""
        tokens = self._model.head.packed.argmax(x, self._masks.wait()).tolist()
        if self._model.vocab_size in tokens or not bool(torch.isfinite(x).all()):
            return None
        return tuple(
            Sampled(forced_token(request, token), None)
            for request, token in zip(requests, tokens, strict=True)
        )

    def _finish(self, raw: Tensor) -> Tensor:
        """float32 [n, vocab_size]; valid until the next."""
        return self._model.finish_logits(raw, self._float_logits.rows(raw.shape[0]))

    def _raw_logits_of(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        """[n, vocab_size] of hidden states [n, hidden_size], row i of ``requests[i]``.

        With the adapters' changes to the head; valid until the next.
        """
        head = self._model.head
        raw = self._raw_logits.rows(x.shape[0])
        head.packed.into(x, raw)
        if any(map(self._adapters.changes_head, requests)):
            head.add_adapters(x, raw, *self._adapters.of_each(requests))
        return raw

    def _can_argmax(self, requests: Sequence[Request]) -> bool:
        """Whether the place of the head's largest output is all that is asked for."""
        if self._model.head.packed.native is None or self._device_sampler is not None:
            return False  # a GPU samples finished logits
        return self._model.is_monotonic and all(
            is_plainly_greedy(request) and not self._adapters.changes_head(request)
            for request in requests
        )

    def _prompt_logprobs(
        self, hidden: Tensor, chunks: Sequence[ScheduledChunk], batch: ForwardBatch
    ) -> dict[str, tuple[TokenLogprobs, ...]]:
        """For requests that ask: of each token of the prompt's text after the chunk's first."""
        find = prompt_logprobs_of
        if self._device_sampler is not None:
            find = self._device_sampler.prompt_logprobs_of
        found: dict[str, tuple[TokenLogprobs, ...]] = {}
        for chunk, rows in zip(chunks, batch.chunk_rows, strict=True):
            request = chunk.request
            n_top = request.source.sampling.prompt_logprobs
            if n_top is None:
                continue
            last = min(chunk.start + chunk.n_tokens, request.n_prompt - 1)
            entries: list[TokenLogprobs] = []
            for at in range(max(chunk.start, request.n_virtual), last, _LOGPROB_ROWS):
                targets = request.token_ids[at + 1 : min(at + _LOGPROB_ROWS, last) + 1]
                first = rows.start + at - chunk.start
                x = hidden[first : first + len(targets)]
                raw = self._raw_logits_of(x, [request] * len(targets))
                entries += find(self._finish(raw), targets, n_top)
            found[request.id] = tuple(entries)
        return found


def _pooled(
    last: Tensor, hidden: Tensor | None, chunks: Sequence[ScheduledChunk], batch: ForwardBatch
) -> dict[str, Tensor]:
    """What the requests for vectors read, by id.

    ``last``: a row for each chunk that ends its prompt; ``hidden``: all rows, None if nobody asked.
    """
    found: dict[str, Tensor] = {}
    n_ended = 0
    for chunk, rows in zip(chunks, batch.chunk_rows, strict=True):
        request, pooling = chunk.request, chunk.request.source.pooling
        n_ended += chunk.samples
        if pooling is None:
            continue
        if not pooling.reads_all_rows:
            if chunk.samples:
                found[request.id] = last[n_ended - 1 : n_ended].float().cpu()
            continue
        assert hidden is not None
        n_virtual = max(0, request.n_virtual - chunk.start)  # these are the adapter's, no text
        found[request.id] = hidden[rows.start + n_virtual : rows.stop].float().cpu()
    return found


def _fed_tokens(chunks: Sequence[ScheduledChunk], behind: StartedStep | None) -> FedTokens | None:
    """Of rows whose token the device alone knows yet."""
    if behind is None or isinstance(behind.tokens, tuple):
        return None
    place = {id(request): i for i, request in enumerate(behind.generating)}
    rows, sources, end = [], [], 0
    for chunk in chunks:
        end += chunk.n_tokens
        if chunk.request.expects_token and chunk.samples:
            rows.append(end - 1)
            sources.append(place[id(chunk.request)])
    return FedTokens(behind.tokens.ids, rows, sources) if rows else None
