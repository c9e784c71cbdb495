"""The answers that a job scores: which one of a chat is expected, and what a busy engine leaves."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.adapters.fine_tuning.answer_scores import AnswerScorer, ScoredRow
from loraplex_server.adapters.fine_tuning.samples import TrainingData
from loraplex_server.adapters.fine_tuning.tuning import TuningPlan, TuningRun
from loraplex_server.adapters.learning.background_share import BackgroundShare
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_server.settings.api_keys import EVERY_ADAPTER
from loraplex_server.tenant_shares import TenantThreads
from loraplex_training.config import AdapterShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import TrainingEngine
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from tests.support.bases.architectures import tiny_model
from tests.support.servers.fake_engine import FakeEngine


def test_the_last_learnt_answer_of_a_chat_is_expected() -> None:
    learn = [False, True, True, False, False, True, True, False]
    row = ScoredRow.of(Datum.of_chat(range(8), learn))
    assert row == ScoredRow((0, 1, 2, 3, 4), (5, 6))
    assert ScoredRow.of(Datum.of_chat(range(3), [False, True, True])) == ScoredRow((0,), (1, 2))


def _engine(rest: Callable[[], None]) -> TrainingEngine:
    model = tiny_model()
    weights = ModelWeights(model)
    return TrainingEngine(FrozenModel(model.config, weights, dtype=torch.float32, rest=rest))


@pytest.mark.anyio
@pytest.mark.parametrize("refuses_later", [False, True])
async def test_a_busy_engine_leaves_an_error_and_no_adapter(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path, refuses_later: bool
) -> None:
    sample = (Datum.of_chat(range(3, 9), [False] * 3 + [True] * 3),)
    data = TrainingData([sample] * 8, [], "", ())
    plan = TuningPlan("supervised", 1, 8, 0.01, 0, AdapterShape(rank=2))
    engine = FakeEngine(tokenizer.backend_tokenizer, "AB", max_queue=5, refuses_later=refuses_later)
    thread = TrainingThread(_engine, BackgroundShare(1.0, lambda: False), 1)
    workers = TenantThreads("scores", 1, 1)
    try:
        with AdapterStore(tmp_path / "store", base_spec) as store:
            run = TuningRun(thread, "", plan, data)
            await run.begin(None, lambda: None)
            assert [report.step async for report in run.steps(1)] == [1]
            scorer = AnswerScorer(engine, store, tokenizer, workers, base_name="tiny")

            async def scored() -> dict[str, object]:
                return dict(await scorer.evaluation(run, "contains", EVERY_ADAPTER, lambda: None))

            assert await scored() == {"metric": "contains", "error": "the queue is full"}
            assert engine.stats().n_running == 0  # nothing needs the lease any more
            assert store.list() == ()
            engine.max_queue = 8
            scores = await scored()
            assert (scores["n_answers"], scores["gain"]) == (8, [0.0, 0.0, 0.0])
            assert store.list() == ()
    finally:
        thread.close()
        workers.close()
