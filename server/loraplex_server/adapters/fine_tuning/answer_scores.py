"""Scores the answers of a trained adapter beside the base's, by the metrics of ``loraplex eval``.

run ──► stored under a name of the server ──► both answer the rows ──► scores; the name is deleted
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.leasing import AdapterLease
from loraplex_adapter_store.names.name_syntax import FINE_TUNED
from loraplex_adapter_store.names.put_options import PutOptions
from loraplex_adapter_store.names.selector import NameRef
from loraplex_adapter_store.report import JsonValue
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.requests.client import EngineClient, GenerationRequest, TenantShare
from loraplex_server.engine.requests.run_to_end import run_to_end
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import ApiError
from loraplex_server.evaluation.metrics import METRICS, mean_of
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_server.tenant_shares import TenantThreads
from loraplex_training.engine.data import Datum

from .results import store_result
from .tuning import TuningRun

_MAX_ROWS = 32
_MAX_TOKENS = 256  # of an answer, as `loraplex eval` asks for
_AT_ONCE = 8  # requests, of which half ask the base
_NAME_LASTS_S = 3600.0  # after a crash
_DIGITS = 4

Evaluation = dict[str, JsonValue]
"""A job shows ``metric`` and ``n_answers``; ``score_before`` and ``score_after``, means
between 0 and 1; ``gain``, the mean difference with the ends of its 95 % interval. ``error`` takes
the place of the scores if the engine or the store gave no answers."""


class ScoredRow(NamedTuple):
    prompt: tuple[int, ...]  # up to the last answer
    expected: tuple[int, ...]  # that answer, with its end

    @classmethod
    def of(cls, datum: Datum) -> "ScoredRow":
        """Return the last answer of a chat that is learnt, and all tokens before it."""
        learnt = datum.weights != 0
        end = int(learnt.nonzero()[-1]) + 1
        gaps = (~learnt[:end]).nonzero()
        first = int(gaps[-1]) + 1 if len(gaps) else 0
        prompt, expected = datum.tokens[: first + 1], datum.targets[first:end]
        return cls(tuple(prompt.tolist()), tuple(expected.tolist()))


class AnswerScorer:
    """Event loop only. ``workers`` store the adapter, load it and score."""

    def __init__(
        self,
        engine: EngineClient,
        store: AdapterStore,
        tokenizer: PreTrainedTokenizerBase,
        workers: TenantThreads,
        *,
        base_name: str,
    ) -> None:
        self._engine, self._store, self._tokenizer = engine, store, tokenizer
        self._workers, self._base_name = workers, base_name

    async def evaluation(
        self,
        run: TuningRun,
        metric: str,
        access: AdapterAccess,
        check: Callable[[], None],
        dtype: torch.dtype = torch.float32,
    ) -> Evaluation:
        """Return the scores of greedy answers to the first judged rows, at most 32.

        ``metric``: a key of ``METRICS``. ``dtype``: of the stored tensors. ``check`` is called
        often, and may raise to stop.
        """
        rows = [ScoredRow.of(datum) for (datum,) in run.judged[:_MAX_ROWS]]
        name = access.own(f"{FINE_TUNED}evaluated::{uuid.uuid4().hex[:10]}")
        try:
            answers = await self._answers(run, rows, name, check, dtype)
        except (EngineError, StoreError, ApiError) as error:
            return {"metric": metric, "error": str(error)}
        score = partial(self._scored, metric, rows, answers)
        return {"metric": metric, **await self._workers.run(run.tenant, score)}

    async def _answers(
        self,
        run: TuningRun,
        rows: Sequence[ScoredRow],
        name: str,
        check: Callable[[], None],
        dtype: torch.dtype,
    ) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Return the tokens that the base and the adapter answer to each row."""
        options = PutOptions(replace=False, expires=time.time() + _NAME_LASTS_S)
        card = await store_result(
            run, self._base_name, self._store, [name], options, self._workers, dtype=dtype
        )
        answers = list[tuple[Sequence[int], Sequence[int]]]()
        try:
            acquire = partial(self._store.acquire, NameRef(name, card.digest[:12]))
            with await self._workers.run(run.tenant, acquire) as lease:
                for first in range(0, len(rows), _AT_ONCE // 2):
                    check()
                    part = rows[first : first + _AT_ONCE // 2]
                    asked = [(row, adapter) for row in part for adapter in (None, lease)]
                    ask = [self._answer(row, adapter, run.tenant) for row, adapter in asked]
                    given = await _all_of(ask)
                    answers += zip(given[::2], given[1::2], strict=True)
        finally:
            await self._workers.run(run.tenant, partial(self._store.start_delete, name))
        return answers

    async def _answer(
        self, row: ScoredRow, adapter: AdapterLease | None, tenant: str
    ) -> Sequence[int]:
        """Raises EngineError."""
        room = self._engine.max_model_len - len(row.prompt)
        request = GenerationRequest(
            f"evaluation-{uuid.uuid4().hex}",
            row.prompt,
            SamplingParams(max_tokens=min(_MAX_TOKENS, room), temperature=0.0),
            adapter,
            cache_salt=f"evaluation:{tenant}",
            share=TenantShare(f"evaluation:{tenant}"),
        )
        events = await run_to_end(self._engine, request)
        return [token for event in events for token in event.token_ids]

    def _scored(
        self,
        metric: str,
        rows: Sequence[ScoredRow],
        answers: Sequence[tuple[Sequence[int], Sequence[int]]],
    ) -> Evaluation:
        def text(ids: Sequence[int]) -> str:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()

        expected = [text(row.expected) for row in rows]
        before, after = (
            [METRICS[metric](text(ids), right) for ids, right in zip(each, expected, strict=True)]
            for each in zip(*answers, strict=True)
        )
        gain = mean_of([late - early for early, late in zip(before, after, strict=True)])
        return {
            "n_answers": len(rows),
            "score_before": round(sum(before) / len(rows), _DIGITS),
            "score_after": round(sum(after) / len(rows), _DIGITS),
            "gain": [round(part, _DIGITS) for part in gain],
        }


async def _all_of(asked: Sequence[Awaitable[Sequence[int]]]) -> list[Sequence[int]]:
    """Return all answers. Raises the first error once none runs, since all need the lease."""
    ended = await asyncio.gather(*asked, return_exceptions=True)
    answers = list[Sequence[int]]()
    for each in ended:
        if isinstance(each, BaseException):
            raise each
        answers.append(each)
    return answers
