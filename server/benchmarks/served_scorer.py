"""Scores adapters through the serving engine, as their users would meet them.

vector ──► PEFT tensors ──► store (checked, folded) ──► lease ──► engine
                                  exact match: greedy replies        NLL: prompt log-probabilities
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from loraplex_adapter_store.selector import ARROW_TOP_K, Library, NameRef
from loraplex_adapter_store.store import AdapterLease, AdapterStore
from loraplex_generation.layout import AdapterLayout
from loraplex_generation.packing import ChatCodec, Row
from loraplex_generation.scoring import TaskScore
from loraplex_generation.zoo.tasks import exact
from loraplex_router.experts import arrow_prototypes
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.client import EngineClient, GenerationRequest
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.events import FinishReason, TokenEvent
from loraplex_server.engine.sampling_params import SamplingParams

__all__ = ["ServedScorer", "served_scorer"]

_MAX_LORAS = 256  # Arrow takes one for each expert of the library
_SPARE_TOKENS = 4  # beyond the answer: a right reply that is cut into other tokens still ends


@contextlib.contextmanager
def served_scorer(
    base_directory: Path, codec: ChatCodec, layout: AdapterLayout, *, n_threads: int
) -> Iterator[ServedScorer]:
    """An engine and a store of its own, gone when left. Raises ModelError or ValueError."""
    config = EngineConfig(threads=n_threads, max_queue=1 << 16, max_loras=_MAX_LORAS)
    built = build_engine(config, base_directory)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            AdapterStore(
                Path(folder),
                built.base_spec,
                gate_of=arrow_prototypes,
            ) as store,
        ):
            yield ServedScorer(built.engine, store, codec, layout)
    finally:
        built.engine.close()


class ServedScorer:
    """A ``Scorer`` of the evaluation. Not to be called on an event loop."""

    def __init__(
        self, engine: EngineClient, store: AdapterStore, codec: ChatCodec, layout: AdapterLayout
    ) -> None:
        self._engine, self._store = engine, store
        self._codec, self._layout = codec, layout
        self._n_requests = 0

    def __call__(self, groups: Sequence[Sequence[Row]], vectors: Tensor | None) -> list[TaskScore]:
        """Raises what the store and the engine raise: nothing is scored in their place."""
        with contextlib.ExitStack() as held:
            leases: list[AdapterLease | None] = [None] * len(groups)
            if vectors is not None:
                leases = [held.enter_context(self._lease(vector)) for vector in vectors]
            return asyncio.run(self._score(groups, leases))

    def arrow(self, groups: Sequence[Sequence[Row]], experts: Tensor) -> list[TaskScore]:
        """Raises what the store and the engine raise."""
        with contextlib.ExitStack() as held:
            refs = [held.enter_context(self._registered(expert)) for expert in experts]
            library = Library(tuple(refs), ARROW_TOP_K)
            with self._store.acquire(library) as lease:
                return asyncio.run(self._score(groups, [lease] * len(groups)))

    @contextlib.contextmanager
    def _lease(self, vector: Tensor) -> Iterator[AdapterLease]:
        with self._registered(vector) as ref, self._store.acquire(ref) as lease:
            yield lease

    @contextlib.contextmanager
    def _registered(self, vector: Tensor) -> Iterator[NameRef]:
        self._n_requests += 1
        name = f"scored-{self._n_requests}"
        config, tensors = self._layout.peft(vector, "base")
        self._store.put_tensors(name, json.loads(json.dumps(config)), tensors)
        try:
            yield NameRef(name)
        finally:
            self._store.delete(name)

    async def _score(
        self, groups: Sequence[Sequence[Row]], leases: Sequence[AdapterLease | None]
    ) -> list[TaskScore]:
        pairs = [(row, lease) for g, lease in zip(groups, leases, strict=True) for row in g]
        right = await asyncio.gather(*(self._is_right(row, lease) for row, lease in pairs))
        nll = await asyncio.gather(*(self._nll(row, lease) for row, lease in pairs))
        scores, at = [], 0
        for rows in groups:
            part = slice(at, at + len(rows))
            n_answer = sum(row.n_answer for row in rows)
            scores.append(TaskScore(sum(nll[part]) / n_answer, tuple(right[part])))
            at = part.stop
        return scores

    async def _is_right(self, row: Row, lease: AdapterLease | None) -> bool:
        n_prompt = len(row.tokens) - row.n_answer
        answer = self._codec.text(row.tokens[n_prompt:-1])  # without the end of the turn
        sampling = SamplingParams(max_tokens=row.n_answer + _SPARE_TOKENS, temperature=0.0)
        events = await self._ask(row.tokens[:n_prompt], sampling, lease)
        reply = self._codec.text([token for event in events for token in event.token_ids])
        return events[-1].finish is FinishReason.STOP and exact(reply, answer)

    async def _nll(self, row: Row, lease: AdapterLease | None) -> float:
        """Nats of the whole answer, the end of the turn included."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        events = await self._ask(row.tokens, sampling, lease)
        tail = events[0].prompt_logprobs[-row.n_answer :]
        return -sum(found.logprob for found in tail if found is not None)

    async def _ask(
        self, tokens: Sequence[int], sampling: SamplingParams, lease: AdapterLease | None
    ) -> list[TokenEvent]:
        done: asyncio.Future[list[TokenEvent]] = asyncio.get_running_loop().create_future()
        events: list[TokenEvent] = []

        def listen(event: TokenEvent) -> None:
            events.append(event)
            if event.error is not None:
                done.set_exception(event.error)
            elif event.finish is not None:
                done.set_result(events)

        self._n_requests += 1
        request = GenerationRequest(
            f"scored-{self._n_requests}", (*self._codec.head, *tokens), sampling, lease
        )
        self._engine.submit(request, listen)
        return await done
