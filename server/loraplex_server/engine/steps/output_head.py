"""Tokens and log-probabilities from the hidden states of a step."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.sampling.sampler import Sampled, SampledRows, Sampler
from loraplex_server.engine.sampling.token_rules import forced_token, is_plainly_greedy
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.model.base_model import BaseModel

from .adapter_rows import AdapterRows

_LOGPROB_ROWS = 64  # rows of a prompt whose logits are in memory at once


class OutputHead:
    """Owner of the logits' memory and of the grammars' masks. Engine thread only."""

    def __init__(
        self, model: BaseModel, adapters: AdapterRows, *, n_rows: int, overlaps: bool
    ) -> None:
        """``n_rows``: most rows of a step that get a token. ``overlaps``: see ``StepMode``."""
        self._model, self._adapters = model, adapters
        self._raw_logits = _RowBuffer(n_rows, model.vocab_size, model.dtype, model.device)
        self._float_logits = _RowBuffer(n_rows, model.vocab_size, torch.float32, model.device)
        self.masks = TokenMasks(n_rows, model.vocab_size)
        self._sampler = Sampler(model.vocab_size, model.eos_token_ids, model.device)
        self._overlaps = overlaps

    def sample(self, x: Tensor, requests: Sequence[Request]) -> SampledRows | tuple[Sampled, ...]:
        """Sample a token from each row of ``x`` [n, hidden_size], which are normed.

        ``masks`` must have been started for ``requests``.
        """
        if self._can_argmax(requests) and (tokens := self._argmax(x, requests)) is not None:
            return tokens
        logits, masks = self._finish(self._raw_logits_of(x, requests)), self.masks.wait()
        return self._sampler.start(logits, requests, masks)

    def prompt_logprobs(
        self, hidden: Tensor, chunk: ScheduledChunk, rows: slice
    ) -> tuple[TokenLogprobs, ...]:
        """Return the log-probabilities of the chunk's prompt tokens after its first.

        ``rows``: of the chunk in ``hidden`` [n_rows, hidden_size].
        """
        request, n_top = chunk.request, chunk.request.source.sampling.prompt_logprobs
        if n_top is None:
            return ()
        last = min(chunk.start + chunk.n_tokens, request.n_prompt - 1)
        entries: list[TokenLogprobs] = []
        for start in range(max(chunk.start, request.n_virtual), last, _LOGPROB_ROWS):
            targets = request.token_ids[start + 1 : min(start + _LOGPROB_ROWS, last) + 1]
            first = rows.start + start - chunk.start
            x = hidden[first : first + len(targets)]
            raw = self._raw_logits_of(x, [request] * len(targets))
            entries += self._sampler.prompt_logprobs_of(self._finish(raw), targets, n_top)
        return tuple(entries)

    def _can_argmax(self, requests: Sequence[Request]) -> bool:
        """Return True if the index of the head's largest output is all that is needed.

        An overlapping step needs its tokens as a tensor.
        """
        if self._model.head.packed.native is None or self._overlaps:
            return False
        return self._model.is_monotonic and all(
            is_plainly_greedy(request) and not self._adapters.changes_head(request)
            for request in requests
        )

    def _argmax(self, x: Tensor, requests: Sequence[Request]) -> tuple[Sampled, ...] | None:
        """Return None if a row has no token, so that ``sample`` reports the reason."""
        tokens = self._model.head.packed.argmax(x, self.masks.wait()).tolist()
        if self._model.vocab_size in tokens or not bool(torch.isfinite(x).all()):
            return None
        return tuple(
            Sampled(forced_token(request, token), None)
            for request, token in zip(requests, tokens, strict=True)
        )

    def _finish(self, raw: Tensor) -> Tensor:
        """Return float32 logits [n, vocab_size], valid until the next call."""
        return self._model.finish_logits(raw, self._float_logits.rows(raw.shape[0]))

    def _raw_logits_of(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        """Return the head's output [n, vocab_size] with adapters, valid until the next call.

        Row i of ``x`` [n, hidden_size] belongs to ``requests[i]``.
        """
        head = self._model.head
        raw = self._raw_logits.rows(x.shape[0])
        head.packed.into(x, raw)
        if any(map(self._adapters.changes_head, requests)):
            head.add_adapters(x, raw, *self._adapters.of_each(requests))
        return raw


class _RowBuffer:
    """A reusable tensor whose first rows are lent out. Used by one thread.

    Fresh memory would cost a page fault for every 4 KiB in each step.
    """

    def __init__(self, capacity: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._tensor = torch.empty((capacity, width), dtype=dtype, device=device)

    def rows(self, n_rows: int) -> Tensor:
        """Return uninitialised [n_rows, width]; the next call may return the same memory.

        More rows than the capacity get new memory.
        """
        if n_rows > self._tensor.shape[0]:
            return self._tensor.new_empty((n_rows, self._tensor.shape[1]))
        return self._tensor[:n_rows]


class TokenMasks:
    """Owner of the masks' memory and of the thread that fills it. Engine thread.

    A mask depends only on the tokens before the step, so it does not wait for the forward.
    """

    def __init__(self, n_rows: int, vocab_size: int) -> None:
        self._masks: NDArray[np.int32] = np.empty((n_rows, -(-vocab_size // 32)), dtype=np.int32)
        self._vocab_size = vocab_size
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loraplex-masks")
        self._executor: LLExecutor | None = None  # has its own threads; created at first use
        self._pending: Future[None] | None = None
        self._n_rows = 0

    def start(self, requests: Sequence[Request]) -> None:
        """Starts to compute the masks of requests that get a token in this step."""
        self.wait()
        rows = [
            (request.constraint.matcher, row)
            for row, request in enumerate(requests)
            if request.constraint is not None and request.constraint.forced is None
        ]
        if not rows:
            self._n_rows = 0
            return
        if self._executor is None:
            self._executor = LLExecutor(num_threads=max(1, min(8, (os.cpu_count() or 2) // 2)))
        self._n_rows = len(requests)
        masks = self._masks[: self._n_rows]
        masks.fill(-1)  # rows without a grammar: all tokens
        self._pending = self._thread.submit(
            fill_next_token_bitmask_par, self._executor, rows, masks
        )

    def wait(self) -> NDArray[np.int32] | None:
        """Wait and return int32 [n_requests, ceil(vocab_size / 32)]; None without grammars.

        Bit i % 32 of word i // 32 is token i. Valid until the next ``start``.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
        return self._masks[: self._n_rows] if self._n_rows else None

    def close(self) -> None:
        self._thread.shutdown()
