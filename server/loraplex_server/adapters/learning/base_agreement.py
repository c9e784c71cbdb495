"""Measures how much a generated adapter changes unrelated chats."""

import asyncio
import uuid

from loraplex_adapter_store.leasing import AdapterLease
from loraplex_server.engine.requests.client import EngineClient, GenerationRequest, TenantShare
from loraplex_server.engine.requests.run_to_end import run_to_end
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.text.text_pipeline import TextPipeline

PROBES = ("What is the capital of France?", "Tell me about bees.", "How do I boil an egg?")
_N_TOKENS = 8


async def base_agreement(
    engine: EngineClient, text: TextPipeline, lease: AdapterLease, share: TenantShare
) -> float:
    """Return the share of greedy tokens on ``PROBES`` that equal the base's: 1 is no change.

    Runs six short requests. Raises EngineError if the engine takes no more.
    """
    prompts = [
        await text.encode_chat(
            [{"role": "user", "content": probe}],
            template=None,
            add_generation_prompt=True,
            continue_final_message=False,
            template_arguments={},
            tenant=share.tenant,
        )
        for probe in PROBES
    ]
    pairs = [(ids, adapter) for ids in prompts for adapter in (None, lease)]
    replies = await asyncio.gather(*[_reply(engine, ids, adapter, share) for ids, adapter in pairs])
    same = [
        float(base[i : i + 1] == adapted[i : i + 1])
        for base, adapted in zip(replies[::2], replies[1::2], strict=True)
        for i in range(max(len(base), len(adapted), 1))
    ]
    return sum(same) / len(same)


async def _reply(
    engine: EngineClient,
    prompt: tuple[int, ...],
    adapter: AdapterLease | None,
    share: TenantShare,
) -> list[int]:
    sampling = SamplingParams(max_tokens=_N_TOKENS, temperature=0.0)
    request = GenerationRequest(f"probe-{uuid.uuid4().hex}", prompt, sampling, adapter, share=share)
    return [token for event in await run_to_end(engine, request) for token in event.token_ids]
