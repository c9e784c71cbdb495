"""The interface of a runner: it computes the chunks of a step."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from loraplex_server.engine.requests.client import LostAtStart
from loraplex_server.engine.requests.events import TokenLogprobs
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.sampling.sampler import Sampled, SampledRows
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of a step, by request id."""

    sampled: dict[str, list[Sampled]]  # a token for each of ``ScheduledChunk.generating``
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]  # of the chunk's tokens after the first
    pooled: dict[str, Tensor]  # hidden states float32 [n, hidden_size], see ``PooledRows.add``


@dataclass(frozen=True, slots=True)
class StartedStep:
    """A launched step, which the device may still be computing."""

    generating: tuple[Request, ...]  # the states that tokens are sampled from
    tokens: SampledRows | tuple[Sampled, ...]  # in the same order; known already on a CPU
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]]
    pooled: dict[str, Tensor]


class StepRunner(ABC):
    """Owner of the step buffers and of the model. Engine thread only."""

    lost_at_start: tuple[LostAtStart, ...] = ()

    @abstractmethod
    def warm_up(self, max_rows: int) -> None:
        """Prepares a GPU for steps of up to ``max_rows`` tokens. Called first."""

    @abstractmethod
    def start(
        self, chunks: Sequence[ScheduledChunk], previous: StartedStep | None = None
    ) -> StartedStep:
        """Launch a step. ``previous``: the step that computes the tokens of placeholders."""

    @abstractmethod
    def finish(self, step: StartedStep) -> StepResult:
        """Wait for a step. Raises the device's errors."""

    @abstractmethod
    def release_cached_memory(self) -> None:
        """Frees torch's cached memory after a step ran out of memory. Waits for the device."""

    @abstractmethod
    def probe(self) -> None:
        """Runs one row of the base. Raises the device's error if it fails."""

    def run(self, chunks: Sequence[ScheduledChunk]) -> StepResult:
        """Run a step and wait for its results."""
        return self.finish(self.start(chunks))
