"""Random batches of concurrent calls over HTTP, against a model of which adapters must exist.

A real engine on a tiny base, the real store, real threads. After each batch there must be an order
of its calls that explains every answer, and what is left must be what that order leaves.
"""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.composites.composite import Composite
from loraplex_adapter_store.names.selector import Mixture, parse_selector
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_generation.request import AdapterGenerationRequest
from loraplex_server.adapters.learning.generated_adapters import (
    GeneratedAdapters,
)
from loraplex_server.engine.engine import Engine
from loraplex_server.settings.api_keys import GENERATED
from loraplex_server.settings.config import HttpConfig, ServerConfig
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.lifecycle_model import Answer, Call, State, apply, explain
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.servers.built_app import built_app
from tests.support.servers.engines import running_engine

_N_KEPT = 1
_TTL_S = 100.0
_START = 1.7e9  # of the clock, seconds since the epoch
_NAMES = ("a", "team/b")
_WISHES = ("to French", "to German")


class World:
    """What all runs share: the engine, adapters on disk, and what each must answer."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        self.engine, self.tokenizer, self.folder = engine, tokenizer, folder
        self.spec = BaseSpec.of(tiny_model(eos_token_id=2), "tiny/llama")
        self.sources: dict[str, str] = {}  # digest → folder
        self.wishes: dict[str, str] = {}  # description → digest
        self.texts: dict[str, str] = {}  # digest → greedy answer
        with AdapterStore(
            folder / "reference", self.spec, engine=EngineHooks(engine.packer)
        ) as store:
            for seed in range(3):
                path = write_lora(folder / "adapters" / f"v{seed}", self.spec, seed=seed, scale=0.5)
                self.sources[store.put_directory(f"v{seed}", path).digest] = f"v{seed}"
            for wish in _WISHES:
                made = ScriptedGenerator(self.spec).generate(AdapterGenerationRequest(wish))
                config = json.loads(json.dumps(made.config))
                self.wishes[wish] = store.put_tensors("made", config, made.tensors).digest

    def mixture_of(self, first: str, second: str) -> str:
        mixture = parse_selector(_mixture("x", "y"))
        assert isinstance(mixture, Mixture)
        return Composite.of_mixture(mixture, self.spec).identify([first, second])


@pytest.fixture(scope="module")
def world(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    with running_engine(tiny_model(eos_token_id=2)) as engine:
        yield World(engine, tokenizer, tmp_path_factory.mktemp("machine"))


def test_concurrent_calls_always_have_an_order_that_explains_them(world: World) -> None:
    class Machine(LifecycleMachine):
        def __init__(self) -> None:
            super().__init__(world)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=12,
            stateful_step_count=8,
            derandomize=True,
            deadline=None,
            phases=[Phase.generate],  # no shrinking: a failure is told at once, whole
            suppress_health_check=list(HealthCheck),
        ),
    )


_name = st.sampled_from(_NAMES)
_version = st.integers(0, 2)
_call = st.one_of(
    st.tuples(st.sampled_from(["put", "create", "delete if", "chat digest"]), _name, _version),
    st.tuples(
        st.sampled_from(
            [
                *("delete", "get", "chat", "mixture", "rollback", "list"),
                *("pin", "unpin", "unload"),
            ]
        ),
        _name,
        st.just(0),
    ),
    st.tuples(st.sampled_from(["generate", "generate named"]), _name, st.integers(0, 1)),
    st.tuples(st.sampled_from(["chat made", "delete made"]), st.just(""), st.integers(0, 1)),
)


class LifecycleMachine(RuleBasedStateMachine):
    """One server's life. Each rule is a batch of calls that run at the same time."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.state = State(_N_KEPT, _START)
        self.folder = tempfile.TemporaryDirectory()
        self.store = AdapterStore(
            Path(self.folder.name),
            world.spec,
            allowed_roots=[world.folder / "adapters"],
            engine=EngineHooks(world.engine.packer),
            n_kept_revisions=_N_KEPT,
        )
        generator = ScriptedGenerator(world.spec)
        self.generated = GeneratedAdapters(
            self.store, lambda: generator, ttl_s=_TTL_S, clock=lambda: self.state.now
        )
        app = built_app(
            world.engine,
            self.store,
            world.tokenizer,
            ServerConfig(http=HttpConfig(served_model_names=("base",))),
            tier=world.engine,
            generated=self.generated,
        )
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000", timeout=60
        )
        self.runner = asyncio.Runner()

    @rule(drawn=st.lists(_call, min_size=2, max_size=5))
    def calls_at_the_same_time(self, drawn: list[tuple[str, str, int]]) -> None:
        self._run([self._call_of(*each) for each in drawn])

    @rule(drawn=st.lists(_call, max_size=3))
    def calls_while_names_expire(self, drawn: list[tuple[str, str, int]]) -> None:
        self.state = State(_N_KEPT, self.state.now + _TTL_S, self.state.names)
        due = [Call("expire", name) for name, e in self.state.names.items() if e.expires]
        self._run([*(self._call_of(*each) for each in drawn), *due])

    @rule(name=_name, versions=st.permutations(range(3)))
    def puts_race_for_a_name(self, name: str, versions: list[int]) -> None:
        self._run([self._call_of("put", name, version) for version in versions])

    def teardown(self) -> None:
        try:
            self._run([Call("delete", name) for name in self.state.names])
            assert self.store.stats().n_leases == 0
            self.generated.close()
            self.store.close()  # waits for what is freed beside
            left = list(Path(self.folder.name, "contents").glob("*/*"))
            assert left == [], "files that no name reaches"
        finally:
            self.runner.close()
            self.generated.close()
            self.store.close()
            self.folder.cleanup()

    def _call_of(self, kind: str, name: str, number: int) -> Call:
        digest = list(self.world.sources)[number]
        wish = _WISHES[number % 2]
        made, expires = self.world.wishes[wish], self.state.now + _TTL_S
        unnamed = f"{GENERATED}{AdapterGenerationRequest(wish).key}"
        match kind:
            case "generate":
                return Call(kind, unnamed, made, expires=expires)
            case "generate named":
                return Call(kind, name, made, expires=expires)
            case "chat made" | "delete made":
                return Call(kind.partition(" ")[0], unnamed)
            case "mixture":
                return Call(kind, _NAMES[0], other=_NAMES[1])
            case _:
                return Call(kind, name, digest)

    def _run(self, calls: list[Call]) -> None:
        answers = self.runner.run(self._answers(calls))
        told = list(zip(calls, answers, strict=True))
        ends = explain(self.state, told, self.world.mixture_of)
        assert ends, f"no order explains these answers from {self.state.names}: {told}"
        listed = self.runner.run(self._send(Call("list")))
        wanted = {
            end: apply(State(_N_KEPT, 0.0, dict(end)), Call("list"), self.world.mixture_of)[0]
            for end in ends
        }
        ends = {end for end, shown in wanted.items() if shown == listed}
        assert ends, f"{listed} is left, explained would be {wanted.values()}; {told}"
        kept = {name: self._kept(name) for name in dict(next(iter(ends)))}
        ends = {end for end in ends if all(entry.kept == kept[name] for name, entry in end)}
        assert ends, f"{kept} is kept, which no order explains; {told}"
        self.state = State(_N_KEPT, self.state.now, dict(next(iter(ends))))

    def _kept(self, name: str) -> tuple[str, ...]:
        answer = self.runner.run(self.client.get(f"/v1/adapters/{name}/revisions"))
        return tuple(entry["digest"] for entry in answer.json()["data"][1:])

    async def _answers(self, calls: list[Call]) -> list[Answer | None]:
        return list(await asyncio.gather(*[self._send(call) for call in calls]))

    async def _send(self, call: Call) -> Answer | None:
        path = f"/v1/adapters/{call.name}"
        match call.kind:
            case "put" | "create":
                headers = {"if-none-match": "*"} if call.kind == "create" else {}
                body = {"source": self.world.sources[call.content]}
                return _told(await self.client.put(path, json=body, headers=headers))
            case "delete" | "delete if":
                match = {"if-match": f'"{call.content}"'} if call.kind == "delete if" else {}
                return _told(await self.client.delete(path, headers=match))
            case "get":
                return _told(await self.client.get(path))
            case "chat":
                return await self._chat(call.name)
            case "chat digest":
                return await self._chat(f"{call.name}@{call.content[:12]}")
            case "mixture":
                return await self._chat(_mixture(call.name, call.other))
            case "pin" | "unpin":
                return _told(await self.client.post(f"{path}/{call.kind}"))[:1]
            case "unload":
                answer = await self.client.post(f"{path}/unload")
                in_use = not answer.is_success and answer.json()["error"]["code"]
                return (200,) if in_use == "adapter_in_use" else _told(answer)[:1]
            case "rollback":
                return _told(await self.client.post(f"{path}/rollback"))
            case "generate" | "generate named":
                wish = next(w for w, digest in self.world.wishes.items() if digest == call.content)
                body = {"description": wish, "probe": False}
                if call.kind == "generate named":
                    body |= {"name": call.name, "ttl_s": _TTL_S}
                return _told(await self.client.post("/v1/adapters/generate", json=body))
            case "list":
                answer = await self.client.get("/v1/adapters")
                pairs = {(card["name"], card["digest"]) for card in answer.json()["data"]}
                return answer.status_code, frozenset(pairs)
            case "expire":
                await asyncio.to_thread(self.store.expire, self.state.now)
                return None
        raise ValueError(call.kind)

    async def _chat(self, adapter: object) -> Answer:
        """The answer's text must be that of the content that it names, whatever else runs."""
        body = {
            "adapter": adapter,
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 6,
            "temperature": 0,
        }
        answer = await self.client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return _told(answer)
        told: dict[str, Any] = answer.json()
        digest, text = told["adapter"]["digest"], told["choices"][0]["message"]["content"]
        assert self.world.texts.setdefault(digest, text) == text
        return 200, digest


def _told(answer: httpx.Response) -> Answer:
    assert answer.status_code < 500, answer.text
    if answer.is_success:
        return answer.status_code, answer.json()["digest"]
    return (answer.status_code,)


def _mixture(first: str, second: str) -> list[dict[str, object]]:
    return [{"name": first, "weight": 0.5}, {"name": second, "weight": 0.5}]
