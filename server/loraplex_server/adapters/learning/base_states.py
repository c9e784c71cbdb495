"""States of the base over prompts, computed by the engine without an adapter."""

import asyncio
import uuid
from collections.abc import Sequence

from torch import Tensor

from loraplex_adapter_store.plan import PoolingMode
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.requests.client import EngineClient, GenerationRequest, TenantShare
from loraplex_server.engine.requests.pooling import Pooling
from loraplex_server.engine.requests.run_to_end import run_to_end
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.errors import from_engine

_NO_SAMPLING = SamplingParams(max_tokens=0, temperature=0.0)


async def pooled_states(
    engine: EngineClient,
    prompts: Sequence[tuple[int, ...]],
    mode: PoolingMode,
    tenant: str,
    *,
    param: str,
) -> list[Tensor]:
    """Return a state [width] of each prompt. All prompts are sent to the engine at once.

    Raises ApiError, whose field is ``param``.
    """
    share = TenantShare(f"generator:{tenant}")

    async def state_of(ids: tuple[int, ...]) -> Tensor:
        name = f"state-{uuid.uuid4().hex}"
        request = GenerationRequest(name, ids, _NO_SAMPLING, share=share, pooling=Pooling(mode))
        pooled = (await run_to_end(engine, request))[-1].pooled
        assert pooled is not None
        return pooled

    try:
        return await asyncio.gather(*[state_of(ids) for ids in prompts])
    except EngineError as error:
        raise from_engine(error, prompt_param=param) from error
