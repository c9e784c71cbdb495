"""A learner that takes steps until the test decides their result."""

import asyncio
import threading
from dataclasses import replace

from loraplex_generation.errors import UnfitExamples
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.adapters.learning.example_learner import (
    ExampleLearner,
    LearningProgress,
    Learnt,
    Pairs,
    Report,
    Score,
)

from .scripted_generator import ScriptedGenerator

_STEP_S = 0.005


class ScriptedLearner(ExampleLearner):
    """A learner whose result is the generator's adapter for ``teaches`` and the description.

    An example whose prompt is "unfit" is refused. ``end`` lets learning end; until then it takes
    steps, and a step is when it notices that it is to stop. While ``goes_on`` is cleared a step
    lasts.
    """

    def __init__(self, generator: ScriptedGenerator) -> None:
        self._generator = generator
        self.end = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.gains, self.timed_out = True, False
        self.held_out, self.held_out_of_turns = (4, 1.0), (2, 0.5)  # right of four pairs, NLL
        self.teaches = "learnt"
        self.error: Exception | None = None
        self.budgets: list[float] = []  # of every job, in the order they began
        self.descriptions: list[str] = []  # the same
        self.began = threading.Semaphore(0)

    def prepare(self, request: AdapterGenerationRequest) -> Pairs:
        if any(prompt == "unfit" for prompt, _ in request.examples):
            raise UnfitExamples("example 1 is unfit")
        return Pairs([], [], [], None)

    def check_budget(self, pairs: Pairs, budget_s: float) -> None:
        pass

    async def learn(
        self,
        request: AdapterGenerationRequest,
        pairs: Pairs,
        tenant: str,
        budget_s: float,
        report: Report,
    ) -> Learnt:
        self.budgets.append(budget_s)
        self.descriptions.append(request.description)
        self.began.release()
        step = 0
        report(LearningProgress("training", 0.0, step))
        while not self.end.is_set():
            await asyncio.sleep(_STEP_S)
            if self.goes_on.is_set():
                step += 1
                report(LearningProgress("training", min(1.0, step / 24), step, 2.0 / step))
        if self.error is not None:
            raise self.error
        learnt, turns = (
            Score(nll, right, 4) for right, nll in (self.held_out, self.held_out_of_turns)
        )
        refinement = {
            "finished": True,
            "start": "base",
            "gained": self.gains,
            "start_is_right": False,
            "steps": step,
            "timed_out": self.timed_out,
            "beats_turns": learnt.holds_against(turns),
            "seconds": 0.1,
            "held_out": {
                "base": Score(5.0, 0, 4).to_json(),
                "before": Score(5.0, 0, 4).to_json(),
                "after": learnt.to_json(),
                "turns": turns.to_json(),
            },
        }
        if not self.gains:
            return Learnt(None, refinement)  # type: ignore[arg-type]
        text = f"{self.teaches}: {request.description}"
        made = self._generator.generate(AdapterGenerationRequest(text, force=True))
        return Learnt(replace(made, card={**made.card, "method": "examples"}), refinement)  # type: ignore[arg-type]
