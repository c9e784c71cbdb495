"""Engines of tiny models, and a client that collects their answers."""

import asyncio
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.engine.build import assemble_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.client import EngineClient, GenerationRequest
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.steps.step_mode import StepMode
from loraplex_server.model.base_model import BaseModel

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
SMALL = EngineConfig(kv_memory_bytes=1 << 20, adapter_memory_bytes=8 << 20, max_loras=32)


@dataclass(frozen=True)
class PlanLease:
    """A lease with the fields that the engine reads."""

    plan: AdapterPlan

    @property
    def digest(self) -> str:
        return self.plan.digest


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def last(self) -> TokenEvent:
        return self.events[-1]

    @property
    def finish(self) -> FinishReason | None:
        return self.last.finish

    @property
    def generated(self) -> list[int]:
        """Return the generated ids, including an end token: log-probabilities are of these."""
        end = self.last.stop_token
        return self.token_ids if end is None else [*self.token_ids, end]


@contextmanager
def running_engine(
    model: PreTrainedModel,
    *,
    fuse: bool = True,
    config: EngineConfig = SMALL,
    mode: StepMode | None = None,
    **changes: object,
) -> Iterator[Engine]:
    """Start an engine on a copy of ``model``; ``changes`` are fields of the config."""
    base = BaseModel(copy.deepcopy(model), "tiny", fuse=fuse, self_check=False)
    engine = assemble_engine(base, config.model_copy(update=changes), mode=mode)
    try:
        yield engine
    finally:
        engine.close()


async def generate(
    engine: EngineClient,
    prompt: Sequence[int],
    sampling: SamplingParams = GREEDY,
    *,
    request_id: str = "r",
    plan: AdapterPlan | None = None,
    salt: str = "",
    prepared: bool = True,
) -> Answer:
    """Submit one request and wait for its last event.

    The plan comes as a store would keep it, checked and packed, unless ``prepared`` is False.
    """
    queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
    if prepared:
        plan = _as_stored(engine, plan)
    lease = None if plan is None else PlanLease(plan)
    request = GenerationRequest(request_id, tuple(prompt), sampling, lease, salt)
    engine.submit(request, queue.put_nowait)
    answer = Answer()
    while True:
        event = await queue.get()
        answer.events.append(event)
        answer.token_ids += event.token_ids
        if event.finish is not None:
            return answer


def _as_stored(engine: EngineClient, plan: AdapterPlan | None) -> AdapterPlan | None:
    """Return the plan as a store would keep it, checked and packed."""
    if plan is None or not isinstance(engine, Engine):
        return plan
    return engine.packer.prepare(plan)


def generate_all(
    engine: EngineClient,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams = GREEDY,
    plans: Sequence[AdapterPlan | None] | None = None,
    *,
    prepared: bool = True,
) -> list[Answer]:
    """Generate for all prompts at once, so that they share steps.

    All plans are packed first: on a busy machine, an early request would end meanwhile.
    """
    packed = [None] * len(prompts) if plans is None else list(plans)
    if prepared:
        packed = [_as_stored(engine, plan) for plan in packed]

    async def run() -> list[Answer]:
        return await asyncio.gather(
            *(
                generate(
                    engine,
                    prompt,
                    sampling,
                    request_id=f"r{index}",
                    plan=packed[index],
                    prepared=False,
                )
                for index, prompt in enumerate(prompts)
            )
        )

    return asyncio.run(run())
