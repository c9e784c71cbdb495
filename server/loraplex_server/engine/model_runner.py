"""Runs the chunks of a step through the model: segments, embeddings, layers, logits, sampling."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.cpu.decoder import LogitsRows
from loraplex_kernels.flashinfer_attention import FlashInferAttention
from loraplex_kernels.layout import LoraSegments
from loraplex_kernels.segments import build_segments, group_runs
from loraplex_kernels.side_stream import SideStream
from loraplex_router.experts import RoutedRows
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.forward_context import FallbackRows

from .decode_graphs import DecodeGraphs, Recorder
from .device import release_cached_memory, use_device
from .device_pool import DevicePool
from .device_sampler import DeviceSampler
from .errors import AdapterUnservable
from .events import TokenLogprobs
from .forward_batch import ForwardBatch, build_batch
from .host_copy import move_together
from .kernel_warm_up import run_every_size
from .kv_cache import KvCache
from .pool_binding import bind_pool
from .request import Request
from .resident_adapter import RowsBeyondThePool
from .row_buffer import RowBuffer
from .sampler import Sampled, forced_token, is_plainly_greedy, prompt_logprobs_of, sample
from .scheduler import ScheduledChunk
from .token_masks import TokenMasks

__all__ = ["ModelRunner", "StepResult"]

_log = logging.getLogger(__name__)
_LOGPROB_ROWS = 64  # of a prompt, whose logits take memory at once


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step found out, by request id."""

    sampled: dict[str, Sampled]
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]  # of the chunk's tokens after the first
    pooled: dict[str, Tensor]  # hidden states float32 [n, hidden_size], see ``PooledRows.add``


class ModelRunner:
    """Owner of the step buffers and of the model. Engine thread only."""

    def __init__(
        self,
        model: BaseModel,
        kv_cache: KvCache,
        adapters: DevicePool,
        recorder: Recorder | None = None,  # of decode steps, see ``decode_graphs``
        side: SideStream | None = None,  # for shrinks, beside the base's products
        flashinfer: FlashInferAttention | None = None,  # for steps that are not recorded
    ) -> None:
        self._model = model
        self._kv = kv_cache
        self._adapters = adapters
        self._flashinfer = flashinfer
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
        self._segments_of: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._known_segments: LoraSegments | None = None  # of a GPU: decode steps repeat
        self._projections = frozenset(
            name for group in model.groups.values() for name in group.module_names
        )
        self._graphs = (
            DecodeGraphs(model, kv_cache, adapters.pool, recorder)
            if recorder is not None and model.is_fused
            else None
        )

    def warm_up(self, max_rows: int) -> None:
        """First of all on the engine thread. ``max_rows``: of a step.

        On a GPU kernels are compiled, and decode steps recorded where that is asked for.
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

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk]) -> StepResult:
        """One forward over all chunks; samples for those that reach their last token."""
        generating = [c.request for c in chunks if c.samples and c.request.source.pooling is None]
        self._masks.start(generating)
        batch = self._lay_out(chunks)
        replayed = self._replay(batch, chunks)
        if replayed is not None:
            return StepResult(self._sample(replayed, generating), {}, {})
        sampling = [
            (c, rows) for c, rows in zip(chunks, batch.chunk_rows, strict=True) if c.samples
        ]
        requests = [chunk.request for chunk, _ in sampling]
        self._fill_step(batch, chunks)
        wants_all = any(c.request.source.reads_all_rows for c in chunks)
        last = batch.sampling_rows  # the rows that get logits; None: each does
        if last is not None and not wants_all:
            on_cpu = last.is_cpu  # only native code reads the segments
            segments = self._segments(requests, [1] * len(requests)) if on_cpu else None
            self._model.step.logits_rows = LogitsRows(last, segments)
        hidden = self._model.forward(self._embed(batch))
        sampled: dict[str, Sampled] = {}
        x = hidden[last] if wants_all and last is not None else hidden
        pooled = _pooled(x, hidden if wants_all else None, chunks, batch)
        if generating:
            if len(generating) < len(requests):
                x = x[[i for i, r in enumerate(requests) if r.source.pooling is None]]
            if self._can_argmax(generating):
                sampled = self._argmax(x, generating)
            else:
                sampled = self._sample(self._raw_logits_of(x, generating), generating)
        found = self._prompt_logprobs(hidden, chunks, batch) if wants_all else {}
        return StepResult(sampled, found, pooled)

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
        step.segments, step.own_rows, step.fallback, step.routed = None, {}, (), {}
        step.routes_projections = False
        model.head.packed(model.forward(model.embed(zero))).cpu()

    def _replay(self, batch: ForwardBatch, chunks: Sequence[ScheduledChunk]) -> Tensor | None:
        """Raw logits [n_chunks, vocab_size] of a recorded step; None if it has to run freely."""
        if self._graphs is None or not self._is_plain_decode(chunks, batch):
            return None
        try:
            return self._graphs.run(batch, [self._slot(chunk.request) for chunk in chunks])
        except Exception as error:
            self._disable_cuda_graphs(error)
            return None

    def _disable_cuda_graphs(self, error: Exception) -> None:
        """The device's error or a compiler's: without graphs all still works."""
        _log.warning("decode steps run without CUDA graphs: %s", error)
        self._graphs = None

    def _is_plain_decode(self, chunks: Sequence[ScheduledChunk], batch: ForwardBatch) -> bool:
        """One token of each request, by adapters that are low-rank factors below the head alone."""
        return not batch.virtual_rows and all(
            chunk.n_tokens == 1
            and chunk.samples
            and chunk.request.source.pooling is None
            and self._is_plain(chunk.request)
            for chunk in chunks
        )

    def _is_plain(self, request: Request) -> bool:
        if not request.adapter_digest:
            return True
        resident = self._adapters.resident(request.adapter_digest)
        return not (resident.needs_fallback or resident.changes_head)

    def _sample(self, raw: Tensor, requests: Sequence[Request]) -> dict[str, Sampled]:
        logits, masks = self._finish(raw), self._masks.wait()
        if self._device_sampler is None:
            tokens = sample(logits, requests, self._model.eos_token_ids, masks)
        else:
            tokens = self._device_sampler.sample(logits, requests, masks)
        return {r.id: token for r, token in zip(requests, tokens, strict=True)}

    def _argmax(self, x: Tensor, requests: Sequence[Request]) -> dict[str, Sampled]:
        tokens = self._model.head.packed.argmax(x, self._masks.wait()).tolist()
        if self._model.vocab_size in tokens:
            raise AdapterUnservable("no token has a probability: the logits are infinite")
        return {
            r.id: Sampled(forced_token(r, t), None) for r, t in zip(requests, tokens, strict=True)
        }

    def _fill_step(self, batch: ForwardBatch, chunks: Sequence[ScheduledChunk]) -> None:
        step = self._model.step
        batch.bind(step)
        requests = [chunk.request for chunk in chunks]
        n_rows = [chunk.n_tokens for chunk in chunks]
        step.segments = self._segments(requests, n_rows, batch.row_slots)
        beyond = self._beyond_the_pool(_own_rows(requests, n_rows, self._adapters), batch.own_rows)
        step.own_rows = batch.own_rows
        step.fallback = _fallback(beyond)
        step.routed = _routed(beyond)
        step.routes_projections = not self._projections.isdisjoint(step.routed)

    def _lay_out(self, chunks: Sequence[ScheduledChunk]) -> ForwardBatch:
        device, requests = self._model.device, [chunk.request for chunk in chunks]
        n_rows = [chunk.n_tokens for chunk in chunks]
        return build_batch(
            chunks,
            self._kv,
            device,
            slots=None if device.type == "cpu" else [self._slot(r) for r in requests],
            own_rows=_own_rows(requests, n_rows, self._adapters),
            flashinfer=self._flashinfer,
        )

    def _segments(
        self,
        requests: Sequence[Request],
        n_rows: Sequence[int],
        row_slots: Tensor | None = None,  # on the device, if they are there already
    ) -> LoraSegments | None:
        """Rows by slot; None when every row is the base's."""
        slots = tuple(self._slot(request) for request in requests)
        if all(slot < 0 for slot in slots):
            return None
        device = self._model.device
        if device.type == "cpu":
            return _cpu_segments(slots, tuple(n_rows))
        key = (slots, tuple(n_rows))
        if self._segments_of != key or self._known_segments is None:
            if row_slots is None:
                repeated = np.repeat(np.array(slots, dtype=np.int32), n_rows)
                (row_slots,) = move_together([repeated], device)
            self._segments_of, self._known_segments = key, build_segments(row_slots)
        return self._known_segments

    def _slot(self, request: Request) -> int:
        digest = request.adapter_digest
        return self._adapters.resident(digest).slots[0] if digest else -1

    def _beyond_the_pool(
        self, own_rows: Mapping[str, Sequence[int]], on_device: Mapping[str, Tensor]
    ) -> list[RowsBeyondThePool]:
        """One element for each adapter that does more than the pool's operator."""
        return [
            self._adapters.resident(digest).rows(tuple(rows), on_device[digest])
            for digest, rows in own_rows.items()
        ]

    def _embed(self, batch: ForwardBatch) -> Tensor:
        embeddings = self._model.embed(batch.token_ids)
        for row, request, index in batch.virtual_rows:
            prefix = self._adapters.resident(request.adapter_digest).parts.prefix
            if prefix is not None and prefix.embeddings is not None:
                embeddings[row] = prefix.embeddings[index]
        return embeddings

    def _finish(self, raw: Tensor) -> Tensor:
        """float32 [n, vocab_size]; valid until the next."""
        return self._model.finish_logits(raw, self._float_logits.rows(raw.shape[0]))

    def _raw_logits_of(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        """[n, vocab_size] of hidden states [n, hidden_size], row i of ``requests[i]``.

        With the adapters' changes to the head; valid until the next.
        """
        head, n_rows = self._model.head, x.shape[0]
        raw = self._raw_logits.rows(n_rows)
        head.packed.into(x, raw)
        if any(map(self._changes_head, requests)):
            each = [1] * n_rows
            own = _own_rows(requests, each, self._adapters)
            rows = [np.array(of_one, dtype=np.int64) for of_one in own.values()]
            on_device = dict(zip(own, move_together(rows, self._model.device), strict=True))
            head.add_adapters(
                x,
                raw,
                self._segments(requests, each),
                _fallback(self._beyond_the_pool(own, on_device)),
            )
        return raw

    def _can_argmax(self, requests: Sequence[Request]) -> bool:
        """Whether the place of the head's largest output is all that is asked for."""
        if self._model.head.packed.native is None:
            return False  # a GPU samples finished logits
        return self._model.is_monotonic and all(
            is_plainly_greedy(request) and not self._changes_head(request) for request in requests
        )

    def _changes_head(self, request: Request) -> bool:
        digest = request.adapter_digest
        return bool(digest) and self._adapters.resident(digest).changes_head

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


def _own_rows(
    requests: Sequence[Request], n_rows: Sequence[int], adapters: DevicePool
) -> dict[str, list[int]]:
    """The rows of each adapter that does more than the pool's operator, by digest, ascending.

    ``n_rows[i]`` neighbouring rows are of ``requests[i]``.
    """
    digests = dict.fromkeys(r.adapter_digest for r in requests if r.adapter_digest)
    found: dict[str, list[int]] = {d: [] for d in digests if adapters.resident(d).needs_fallback}
    if not found:
        return found
    end = 0
    for request, n in zip(requests, n_rows, strict=True):
        first, end = end, end + n
        if request.adapter_digest in found:
            found[request.adapter_digest].extend(range(first, end))
    return found


def _fallback(beyond: Sequence[RowsBeyondThePool]) -> tuple[FallbackRows, ...]:
    return tuple(one.fallback for one in beyond if one.fallback is not None)


def _routed(beyond: Sequence[RowsBeyondThePool]) -> dict[str, tuple[RoutedRows, ...]]:
    """By MLP block or projection: the rows whose adapter routes there."""
    routed: dict[str, tuple[RoutedRows, ...]] = {}
    for one in beyond:
        for place, part in one.routed.items():
            routed[place] = (*routed.get(place, ()), part)
    return routed


@functools.lru_cache(maxsize=4)  # decode steps repeat
def _cpu_segments(slots: tuple[int, ...], n_rows: tuple[int, ...]) -> LoraSegments:
    return group_runs(slots, n_rows)
