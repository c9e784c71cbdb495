"""A Trainer that takes steps until the test says what came of them."""

from __future__ import annotations

import threading

from loraplex_generation.errors import NothingLearnt, UnfitExamples
from loraplex_generation.refinement import Progress, RefinementProgress
from loraplex_generation.service import GeneratedAdapter, Generator
from loraplex_server.adapters.generated_adapters import AdapterGenerationRequest

__all__ = ["ScriptedTrainer"]

_STEP_S = 0.005


class ScriptedTrainer:
    """What is learnt is the generator's adapter for ``teaches`` and the description.

    An example whose prompt is "unfit" is refused. ``end`` lets training end; until then it takes
    steps, and a step is when it notices that it is to stop. While ``goes_on`` is cleared a step
    lasts.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self.end = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.gains, self.timed_out = True, False
        self.held_out, self.held_out_of_turns = (4, 1.0), (2, 0.5)  # right of four pairs, NLL
        self.teaches = "learnt"
        self.error: Exception | None = None
        self.deadlines: list[float] = []  # of every training, in the order they began
        self.began = threading.Semaphore(0)

    def check(self, request: AdapterGenerationRequest) -> None:
        if any(prompt == "unfit" for prompt, _ in request.examples):
            raise UnfitExamples("example 1 is unfit")

    def train(
        self,
        request: AdapterGenerationRequest,
        *,
        deadline: float,
        stop: threading.Event,
        report: Progress,
    ) -> GeneratedAdapter:
        self.deadlines.append(deadline)
        self.began.release()
        step = 0
        report(RefinementProgress("training", step, 24, None))
        while not self.end.wait(_STEP_S):
            self.goes_on.wait()
            step += 1
            report(RefinementProgress("training", step, 24, 2.0 / step))
        if self.error is not None:
            raise self.error
        refused = self._generator.refuses(self._generator.read(request.description))
        if refused and not (request.force or self.gains):
            raise NothingLearnt(len(request.examples), 2.0)
        text = f"{self.teaches}: {request.description}" if self.gains else request.description
        made = self._generator.generate(text, force=True)
        refinement = {
            "finished": True,
            "start": "draft",
            "gained": self.gains,
            "steps": step,
            "n_steps": 24,
            "timed_out": self.timed_out,
            "held_out": {
                "after": _score(*self.held_out),
                "turns": _score(*self.held_out_of_turns),
            },
        }
        return self._generator.dressed(made.vector, {**made.card, "refinement": refinement})


def _score(n_right: int, nll: float) -> dict[str, object]:
    return {"exact": n_right, "of": 4, "nll": nll}
