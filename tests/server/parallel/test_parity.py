"""Two processes answer what one does, over HTTP: tokens equal, log-probabilities up to rounding.

The one process is held to PEFT and transformers elsewhere (``tests/conformance``).
"""

import asyncio
from pathlib import Path

import peft
import pytest

from loraplex_server.engine.parallel.shard_workers import ShardWorkers
from tests.server.parallel.conftest import PROMPT, Answer, Pair, ask, ask_all, check_same
from tests.support.adapters.peft_adapters import peft_adapter
from tests.support.bases.tiny_models import tiny_llama
from tests.vectors.conftest import Server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore::Warning"),
]

# They need whole rows of what a rank has a part of; as in docs/tensor-parallel.md.
REFUSED = {"boft", "oft", "road", "loramoe", "mola"}


async def put_all(server: Server, folders: dict[str, Path]) -> dict[str, str]:
    """What each refusal says, by name."""
    refused = {}
    for name, folder in folders.items():
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        answer = await server.client.put(f"/v1/adapters/{name}", files=files)
        if answer.status_code not in (200, 201):
            refused[name] = answer.text
    return refused


async def test_every_family_answers_the_same_or_is_refused_in_words(
    pair: Pair, folders: dict[str, Path]
) -> None:
    assert await put_all(pair.alone, folders) == {}
    refused = await put_all(pair.split, folders)
    assert refused.keys() == REFUSED
    assert all("without --tensor-parallel-size" in said for said in refused.values())
    together: list[str | None] = [*sorted(folders.keys() - refused.keys()), None]
    expected = await ask_all(pair.alone, together)
    assert len({tuple(one.tokens) for one in expected}) > 20  # they do differ
    found = await ask_all(pair.split, together)
    for name, one, other in zip(together, found, expected, strict=True):
        check_same(one, other, name)
    assert pair.split.engine.loop.adapters.n_evictions > 0  # more adapters than slots


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, peft.PeftConfig] = {
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=LINEARS),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=LINEARS),
    "lora_bias": peft.LoraConfig(r=4, bias="all", target_modules=LINEARS),
    "everywhere": peft.LoraConfig(r=4, target_modules=[*LINEARS, "lm_head", "embed_tokens"]),
    "saved_head": peft.LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(target_modules=LINEARS, feedforward_modules=["up_proj", "down_proj"]),
}


async def test_every_linear_answers_as_peft_does(pair: Pair, tmp_path: Path) -> None:
    model, oracles = tiny_llama(bias=True), {}
    for name, config in CONFIGS.items():
        (tmp_path / name).mkdir()
        oracles[name] = peft_adapter(model, config, tmp_path / name)
    assert await put_all(pair.split, {name: tmp_path / name for name in oracles}) == {}
    found = await ask_all(pair.split, [*oracles])
    for (name, oracle), answer in zip(oracles.items(), found, strict=True):
        _, logprobs = oracle.greedy(PROMPT, len(answer.tokens))
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-3), name


async def test_requests_that_leave_share_and_are_preempted_change_nothing(
    pair: Pair, folders: dict[str, Path]
) -> None:
    """More long answers than the KV memory holds, of prompts with a common beginning; two leave."""
    await put_all(pair.split, {name: folders[name] for name in ("lora", "mixlora")})
    await put_all(pair.alone, {name: folders[name] for name in ("lora", "mixlora")})
    common = [7 + i % 50 for i in range(40)]
    wishes = [
        (adapter, [*common, 5 + i]) for i, adapter in enumerate(("lora", None, "mixlora") * 6)
    ]

    async def all_of(server: Server) -> list[Answer]:
        return await asyncio.gather(
            *(ask(server, name, prompt=prompt, max_tokens=40) for name, prompt in wishes)
        )

    async def leave(server: Server) -> None:
        body = {"prompt": common, "max_tokens": 60, "stream": True, "ignore_eos": True}
        async with server.client.stream("POST", "/v1/completions", json=body) as answer:
            await anext(answer.aiter_bytes())

    expected = await all_of(pair.alone)
    found, *_ = await asyncio.gather(all_of(pair.split), leave(pair.split), leave(pair.split))
    for one, other, wish in zip(found, expected, wishes, strict=True):
        check_same(one, other, wish)
    loop = pair.split.engine.loop
    assert loop._scheduler.n_preemptions > 0
    assert loop.kv_cache.n_found > 0


async def test_vectors_and_the_log_probabilities_of_prompts(
    pair: Pair, folders: dict[str, Path]
) -> None:
    """Hidden states of all rows, and the head asked for more rows than a step samples."""
    found = []
    for server in pair:
        await put_all(server, {"lora": folders["lora"]})
        prompt = PROMPT * 8  # of more tokens than a step has
        completion = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await server.post("/v1/completions", adapter="lora", **completion)
        assert answer.status_code == 200, answer.text
        entries = answer.json()["choices"][0]["prompt_logprobs"][1:]
        (vector,) = await server.data("/v1/embeddings", input=[prompt], adapter="lora")
        found.append(([one["logprob"] for e in entries for one in e.values()], vector["embedding"]))
    (expected_logprobs, expected_vector), (logprobs, vector) = found
    assert len(logprobs) >= 79
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    assert vector == pytest.approx(expected_vector, abs=1e-4)


async def test_an_adapter_that_is_replaced_while_it_runs(
    pair: Pair, folders: dict[str, Path]
) -> None:
    """The answer that runs keeps its weights, the next has the new ones."""
    alone, split = pair
    for server in pair:
        await put_all(server, {"old": folders["lora"], "new": folders["ia3"]})
        await put_all(server, {"changing": folders["lora"]})
    old, new = await ask_all(alone, ["old", "new"], max_tokens=60)
    assert old.tokens != new.tokens
    running = asyncio.create_task(ask(split, "changing", max_tokens=60))
    while not split.engine.stats().n_running:
        await asyncio.sleep(0)
    await put_all(split, {"changing": folders["ia3"]})
    check_same(await ask(split, "changing", max_tokens=60), new)
    check_same(await running, old)


async def test_a_load_that_fails_on_one_rank_is_that_adapters_error(
    pair: Pair, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first slot is named wrongly to rank 1, where another adapter has it."""
    split = pair.split
    for server in pair:
        await put_all(server, {"lora": folders["lora"], "dora": folders["sora"]})
    await ask(split, "lora")
    await split.engine.unload(await digest_of(split, "dora"))
    taken = split.engine.loop.adapters.resident(await digest_of(split, "lora")).memory.slots[0]
    load = ShardWorkers.load
    monkeypatch.setattr(ShardWorkers, "load", lambda self, plan, _: load(self, plan, taken))
    failed = await split.post("/v1/completions", prompt=PROMPT, adapter="dora")
    assert failed.status_code == 503
    assert failed.json()["error"]["code"] == "adapter_load_failed"
    monkeypatch.undo()
    expected = await ask_all(pair.alone, ["dora", "lora", None])
    found = await ask_all(split, ["dora", "lora", None])
    for one, other in zip(found, expected, strict=True):
        check_same(one, other)


async def digest_of(server: Server, name: str) -> str:
    digest: str = (await server.client.get(f"/v1/adapters/{name}")).json()["digest"]
    return digest
