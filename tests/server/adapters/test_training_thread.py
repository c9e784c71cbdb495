"""The thread that trains merges the calls of many jobs, and keeps each one's results its own."""

import asyncio
from collections.abc import Callable

import pytest
import torch

from loraplex_server.adapters.learning.background_share import BackgroundShare
from loraplex_server.adapters.learning.training_thread import TrainingThread
from loraplex_training.engine.adapter import Adam, LoraShape
from loraplex_training.engine.data import Datum
from loraplex_training.engine.engine import BATCH_TOKENS, TrainingEngine, Work
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from tests.support.bases.architectures import tiny_model


def _thread() -> TrainingThread:
    def make(rest: Callable[[], None]) -> TrainingEngine:
        model = tiny_model()
        weights = ModelWeights(model)
        return TrainingEngine(FrozenModel(model.config, weights, dtype=torch.float32, rest=rest))

    return TrainingThread(make, BackgroundShare(1.0, lambda: False), 1)


def _datum(seed: int, n: int = 20) -> Datum:
    tokens = torch.randint(3, 60, (n + 1,), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(n)
    weights[n // 2 :] = 1
    return Datum(tokens[:-1], tokens[1:], weights)


def test_jobs_share_batches_and_learn_as_if_alone() -> None:
    async def learn(thread: TrainingThread, seeds: range) -> list[list[float]]:
        adapters = [await thread.new_adapter(LoraShape(4, 8.0), seed) for seed in seeds]

        async def job(i: int) -> list[float]:
            losses = []
            for step in range(3):
                outcome = await thread.forward_backward(
                    f"tenant-{i % 2}", Work(adapters[i], [_datum(step), _datum(step + i)])
                )
                losses.append(outcome.loss)
                await thread.step(f"tenant-{i % 2}", adapters[i], Adam(lr=1e-2))
            return losses

        return await asyncio.gather(*(job(i) for i in range(len(seeds))))

    async def main() -> None:
        together, alone = _thread(), _thread()
        try:
            mixed = await learn(together, range(4))
            assert together.n_shared > 0
            assert together.n_batches < 12  # steps of the four jobs one after the other
            first = await learn(alone, range(1))
            assert mixed[0] == pytest.approx(first[0], rel=1e-4)
            assert mixed[0][-1] < mixed[0][0]
        finally:
            together.close()
            alone.close()

    asyncio.run(main())


def test_a_large_work_leaves_others_their_turn_and_an_error_is_its_own() -> None:
    async def main() -> None:
        thread = _thread()
        try:
            large, small, bad = [await thread.new_adapter(LoraShape(2, 4.0), i) for i in range(3)]
            data = [_datum(i, 200) for i in range(12 * BATCH_TOKENS // 200)]
            ended: list[str] = []

            async def ends(name: str, work: Work) -> None:
                try:
                    await thread.forward_backward(name, work)
                    ended.append(name)
                except KeyError:
                    ended.append(f"{name} failed")

            def no_loss(logprobs: torch.Tensor, datum: Datum) -> torch.Tensor:
                return logprobs.sum() * datum.extra["nothing"]

            await asyncio.gather(
                ends("large", Work(large, data)),
                ends("small", Work(small, [_datum(1)])),
                ends("bad", Work(bad, [_datum(2)], no_loss)),
            )
            assert ended[-1] == "large"
            assert sorted(ended[:2]) == ["bad failed", "small"]
        finally:
            thread.close()

    asyncio.run(main())


def test_a_closed_thread_ends_what_waits() -> None:
    async def main() -> None:
        thread = _thread()
        adapter = await thread.new_adapter(LoraShape(2, 4.0), 0)
        data = [_datum(i, 500) for i in range(200)]
        calls = [
            asyncio.ensure_future(thread.forward_backward("", Work(adapter, data)))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        thread.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(main())
