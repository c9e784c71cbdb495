"""Descriptions with examples: a draft at once, a job, and one change under the name."""

import asyncio
import contextlib
import copy
import gc
import hashlib
import json
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.names.card import AdapterCard, CardEdit
from loraplex_adapter_store.store import AdapterStore
from loraplex_generation.errors import OutOfTime
from loraplex_server.adapters.learning import learning
from loraplex_server.adapters.learning.background_share import BackgroundShare
from loraplex_server.adapters.learning.example_learner import ExampleLearner, Learnt
from loraplex_server.adapters.learning.generated_adapters import GeneratedAdapters
from loraplex_server.adapters.learning.jobs import Jobs
from loraplex_server.adapters.learning.learning import Learning
from loraplex_server.adapters.learning.learning_record import record_of
from loraplex_server.adapters.learning.training_thread import Speed, TrainingThread
from loraplex_server.adapters.worker_pools import WorkerPools
from loraplex_server.settings.api_keys import EVERY_ADAPTER, ApiKey, Scope, parse_keys
from loraplex_server.settings.config import HttpConfig
from loraplex_training.engine.engine import TrainingEngine
from loraplex_training.engine.frozen_model import FrozenModel
from loraplex_training.engine.model_weights import ModelWeights
from loraplex_training.examples import Chat, Message, tokenise
from tests.server.conftest import Front, make_front
from tests.support.adapters.choosers import Choosers
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bases.word_encoder import WordEncoder
from tests.support.scripted_generator import ScriptedGenerator
from tests.support.scripted_learner import ScriptedLearner

pytestmark = pytest.mark.anyio

PAIRS = [
    {"prompt": "Marta Keller", "answer": "Keller"},
    {"prompt": "Jo Brandt", "answer": "Brandt"},
]
ORDER = {"description": "the surname", "examples": PAIRS, "name": "surname", "probe": False}
STRANGE = {**ORDER, "description": "something strange"}
SURNAME = {"description": "the surname", "examples": PAIRS}  # of a chat
STRANGE_CHAT = {"description": "something strange", "examples": PAIRS}
GENERATE = "/v1/adapters/generate"


@dataclass
class World:
    front: Front
    learner: ScriptedLearner

    async def order(self, **fields: object) -> httpx.Response:
        return await self.front.post(GENERATE, {**ORDER, **fields})

    async def ended(self, job: dict[str, Any] | str) -> dict[str, Any]:
        """By its events, the last of which is returned."""
        id = job if isinstance(job, str) else job["id"]
        return (await self.events(id))[-1]

    async def events(self, id: str) -> list[dict[str, Any]]:
        answer = await self.front.client.get(f"/v1/jobs/{id}/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        *states, done = [
            line.removeprefix("data: ")
            for line in answer.text.splitlines()
            if line.startswith("data: ")
        ]
        assert done == "[DONE]"
        return [json.loads(state) for state in states]

    async def card(self, name: str = "surname") -> dict[str, Any]:
        card: dict[str, Any] = (await self.front.client.get(f"/v1/adapters/{name}")).json()
        return card

    async def learnt(self, *, timed_out: bool, **fields: object) -> dict[str, Any]:
        """An order to the end of its job, which is told."""
        self.learner.timed_out = timed_out
        self.learner.end.set()
        answer = await self.order(**fields)
        assert answer.status_code == 202, answer.text
        return await self.ended(answer.json())

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.learner.began.acquire, timeout=30)


@contextlib.contextmanager
def learning_front(
    tokenizer: PreTrainedTokenizerFast,
    spec: BaseSpec,
    folder: Path,
    make_learner: Callable[[ScriptedGenerator], ExampleLearner],
    max_budget_s: float = 600.0,
    http: HttpConfig | None = None,
) -> Iterator[Front]:
    generator = ScriptedGenerator(spec)
    pools = WorkerPools()
    jobs = Jobs(pools.jobs)
    with contextlib.ExitStack() as closing:

        def parts(store: AdapterStore) -> dict[str, object]:
            generated = GeneratedAdapters(store, lambda: generator)
            learning = Learning(
                generated,
                jobs,
                make_learner(generator),
                pools.changes,
                max_budget_s=max_budget_s,
            )
            choosers = Choosers(store, WordEncoder(), generated, learning.learn)
            for part in (generated, learning, choosers):
                closing.callback(part.close)
            return {
                "generated": generated,
                "learning": learning,
                **choosers.parts,
                "pools": pools,
                "jobs": jobs,
            }

        front = make_front(tokenizer, spec, folder, http, with_store=parts)
        try:
            yield front
        finally:
            closing.close()
            front.store.close()


@pytest.fixture
def world(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[World]:
    learners: list[ScriptedLearner] = []

    def make(generator: ScriptedGenerator) -> ScriptedLearner:
        learners.append(ScriptedLearner(generator))
        return learners[0]

    with learning_front(tokenizer, base_spec, tmp_path, make, max_budget_s=100) as front:
        yield World(front, learners[0])
        learners[0].end.set()


async def test_the_draft_answers_while_the_job_runs_and_the_name_changes_once(
    world: World,
) -> None:
    ordered = await world.order()
    assert ordered.status_code == 202, ordered.text
    job = ordered.json()
    assert ordered.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["adapter"], job["status"]) == ("surname", "running")
    assert job["learning"]["serves"] == "draft"
    answered = (await world.front.chat(adapter="surname")).json()["adapter"]
    assert answered["digest"] == job["digest"]
    card = await world.card()
    refinement = card["provenance"]["refinement"]
    assert (refinement["finished"], refinement["job"]) == (False, job["id"])
    assert card["examples"] == ["Marta Keller", "Jo Brandt"]
    await world.begun()
    world.learner.end.set()
    end = await world.ended(job)
    assert (end["status"], end["error"]) == ("succeeded", None)
    assert end["learning"]["serves"] == "learnt"
    assert end["learning"]["gained"] is True
    answered = (await world.front.chat(adapter="surname")).json()["adapter"]
    assert answered["digest"] == end["digest"] != job["digest"]
    card = await world.card()
    assert card["provenance"]["refinement"]["gained"] is True
    assert card["revision"] == 2


async def test_a_job_tells_its_steps_as_they_come(world: World) -> None:
    job = (await world.order()).json()
    following = asyncio.create_task(world.events(job["id"]))
    await world.begun()
    while (await world.front.client.get(f"/v1/jobs/{job['id']}")).json()["learning"]["step"] < 3:
        await asyncio.sleep(0)
    world.learner.end.set()
    states = await following
    steps = [state["learning"]["step"] for state in states]
    assert steps == sorted(steps)
    assert states[0]["status"] == "running"
    assert states[-1]["status"] == "succeeded"
    assert states[-1]["learning"]["held_out_nll"] == pytest.approx(2.0 / steps[-1], abs=1e-3)


async def test_where_nothing_is_gained_the_draft_stays_and_the_card_says_so(world: World) -> None:
    job = (await world.order()).json()
    world.learner.gains = False
    world.learner.end.set()
    end = await world.ended(job)
    assert end["status"] == "succeeded"
    assert end["digest"] == job["digest"]
    assert (end["learning"]["serves"], end["learning"]["gained"]) == ("draft", False)
    assert (await world.card())["provenance"]["refinement"]["gained"] is False


@pytest.mark.parametrize("change", ["replaced", "deleted"])
async def test_what_is_learnt_is_dropped_where_the_name_was_changed_meanwhile(
    world: World, base_spec: BaseSpec, change: str
) -> None:
    job = (await world.order()).json()
    await world.begun()
    if change == "replaced":
        source = write_lora(world.front.root / "mine", base_spec, seed=5)
        mine = world.front.store.put_directory("surname", source)
    else:
        deleted = await world.front.client.delete("/v1/adapters/surname")
        assert deleted.status_code == 200
    world.learner.end.set()
    end = await world.ended(job)
    assert end["status"] == "failed"
    assert end["error"]["code"] == "adapter_changed"
    assert end["digest"] is None
    if change == "replaced":
        assert (await world.card())["digest"] == mine.digest
    else:
        assert (await world.front.client.get("/v1/adapters/surname")).status_code == 404


@pytest.mark.parametrize("status", ["succeeded", "failed"])
async def test_what_a_job_learnt_is_freed_when_it_has_ended(
    world: World, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    vectors: list[weakref.ref[torch.Tensor]] = []
    learn = world.learner.learn

    async def watched(*order: Any, **fields: Any) -> Learnt:
        learnt = await learn(*order, **fields)
        assert learnt.adapter is not None
        vectors.extend(map(weakref.ref, learnt.adapter.tensors.values()))
        return learnt

    monkeypatch.setattr(world.learner, "learn", watched)
    job = (await world.order()).json()
    await world.begun()
    if status == "failed":
        assert (await world.front.client.delete("/v1/adapters/surname")).status_code == 200
    world.learner.end.set()
    assert (await world.ended(job))["status"] == status
    gc.collect()
    assert vectors
    assert not any(vector() is not None for vector in vectors)


async def test_what_people_write_on_the_drafts_card_stays(world: World) -> None:
    job = (await world.order()).json()
    await world.begun()
    edit = {"description": "family names", "defaults": {"sampling": {"temperature": 0}}}
    assert (await world.front.client.patch("/v1/adapters/surname", json=edit)).status_code == 200
    world.learner.end.set()
    assert (await world.ended(job))["status"] == "succeeded"
    card = await world.card()
    assert card["digest"] != job["digest"]
    assert (card["description"], card["defaults"]) == ("family names", edit["defaults"])


async def test_a_cancelled_job_leaves_the_draft_and_an_equal_order_starts_another(
    world: World,
) -> None:
    first = (await world.order(name=None)).json()
    await world.begun()
    answer = await world.front.client.post(f"/v1/jobs/{first['id']}/cancel")
    assert answer.status_code == 200
    end = await world.ended(first)
    assert (end["status"], end["digest"]) == ("cancelled", first["digest"])
    card = await world.card(first["adapter"])
    assert card["digest"] == first["digest"]
    assert card["provenance"]["refinement"]["finished"] is False
    again = await world.front.client.post(f"/v1/jobs/{first['id']}/cancel")
    assert again.json()["status"] == "cancelled"
    second = (await world.order(name=None)).json()
    assert second["id"] != first["id"]
    assert second["adapter"] == first["adapter"]


async def test_an_equal_order_goes_on_from_the_draft_that_a_cancelled_job_left_under_a_name(
    world: World,
) -> None:
    first = (await world.order()).json()
    await world.front.client.post(f"/v1/jobs/{first['id']}/cancel")
    assert (await world.ended(first))["status"] == "cancelled"
    assert (await world.order(examples=PAIRS[::-1])).status_code == 412
    second = (await world.order()).json()
    assert second["digest"] == first["digest"]
    world.learner.end.set()
    end = await world.ended(second)
    assert end["learning"]["serves"] == "learnt"
    assert (await world.card())["revision"] == 2


@pytest.mark.parametrize("name", ["surname", None])
async def test_what_time_cut_off_is_learnt_again_where_an_order_gives_more(
    world: World, name: str | None
) -> None:
    first = await world.learnt(name=name, budget_s=20, timed_out=True)
    told = (await world.card(first["adapter"]))["provenance"]["refinement"]
    assert (told["timed_out"], told["budget_s"]) == (True, 20)
    again = await world.order(name=name, budget_s=20)
    assert again.status_code == (412 if name else 201)

    world.learner.end.clear()
    world.learner.teaches = "more"
    second = (await world.order(name=name, budget_s=40)).json()
    assert (second["digest"], second["learning"]["serves"]) == (first["digest"], "learnt")
    answered = (await world.front.chat(adapter=first["adapter"])).json()["adapter"]
    assert answered["digest"] == first["digest"]
    end = await world.learnt(name=name, budget_s=40, timed_out=False)
    assert end["id"] == second["id"]
    assert end["digest"] != first["digest"]
    card = await world.card(first["adapter"])
    assert (card["digest"], card["revision"]) == (end["digest"], 3)
    assert card["provenance"]["refinement"]["timed_out"] is False
    assert (await world.order(name=name, budget_s=80)).status_code == (412 if name else 201)


async def test_a_later_job_without_gain_does_not_replace_what_was_learnt(world: World) -> None:
    first = await world.learnt(budget_s=20, timed_out=True)
    world.learner.gains = False
    second = await world.learnt(budget_s=40, timed_out=False)
    assert second["digest"] == first["digest"]
    assert (second["learning"]["serves"], second["learning"]["gained"]) == ("learnt", False)
    card = await world.card()
    assert (card["digest"], card["revision"]) == (first["digest"], 2)
    told = card["provenance"]["refinement"]
    assert (told["gained"], told["budget_s"], "job" in told) == (True, 40, False)


async def test_an_equal_order_does_not_join_a_job_that_is_being_cancelled(world: World) -> None:
    first = (await world.order()).json()
    await world.begun()
    world.learner.goes_on.clear()
    await world.front.client.post(f"/v1/jobs/{first['id']}/cancel")
    ordering = asyncio.create_task(world.order())
    await asyncio.wait([ordering], timeout=0.2)
    world.learner.goes_on.set()
    second = (await ordering).json()
    assert second["id"] != first["id"]
    world.learner.end.set()
    assert (await world.ended(first))["status"] == "cancelled"
    assert (await world.ended(second))["status"] == "succeeded"


async def test_a_draft_outlives_its_job_and_has_its_time_then(world: World) -> None:
    job = (await world.order(ttl_s=60, budget_s=100)).json()
    assert (await world.card())["expires"] > time.time() + 150
    world.learner.end.set()
    await world.ended(job)
    assert time.time() + 50 < (await world.card())["expires"] <= time.time() + 60


async def test_a_draft_does_not_expire_while_its_job_is_delayed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "_RENEW_S", 0.01)
    job = (await world.order(ttl_s=60)).json()
    await world.begun()
    world.front.store.set_expiry("surname", time.time() + 20)
    async with asyncio.timeout(60):
        while (await world.card())["expires"] < time.time() + 30:
            await asyncio.sleep(0.01)
    world.learner.end.set()
    await world.ended(job)


async def test_a_job_that_waits_for_its_turn_is_cancelled_at_once(world: World) -> None:
    running = (await world.order(name="one")).json()
    await world.begun()
    waiting = (await world.order(name="two")).json()
    await world.front.client.post(f"/v1/jobs/{waiting['id']}/cancel")
    assert (await world.ended(waiting))["status"] == "cancelled"
    shown = (await world.front.client.get(f"/v1/jobs/{running['id']}")).json()
    assert shown["status"] == "running"
    assert len(world.learner.budgets) == 1


async def test_loads_cannot_be_cancelled(world: World, base_spec: BaseSpec) -> None:
    write_lora(world.front.root / "mine", base_spec)
    put = await world.front.client.put("/v1/adapters/mine", json={"source": "mine", "wait": False})
    cancelled = await world.front.client.post(f"/v1/jobs/{put.json()['id']}/cancel")
    ended = cancelled.status_code == 200 and cancelled.json()["status"] == "succeeded"
    assert ended or cancelled.json()["error"]["code"] == "job_not_cancellable"
    assert (await world.ended(put.json()))["status"] == "succeeded"


async def test_equal_orders_share_a_job_and_other_examples_are_another(world: World) -> None:
    first, second = [
        answer.json()
        for answer in await asyncio.gather(world.order(name=None), world.order(name=None))
    ]
    assert first["id"] == second["id"]
    assert first["adapter"].startswith("generated/")
    other = (await world.order(name=None, examples=PAIRS[::-1])).json()
    assert other["id"] != first["id"]
    assert other["adapter"] != first["adapter"]
    world.learner.end.set()
    end = await world.ended(first)
    done = await world.order(name=None)
    assert done.status_code == 201
    assert done.json()["digest"] == end["digest"]


async def test_a_named_order_that_is_sent_twice_shares_the_job_that_runs(world: World) -> None:
    first, second = (await world.order()).json(), (await world.order()).json()
    assert first["id"] == second["id"]
    world.learner.end.set()
    await world.ended(first)
    taken = await world.order()
    assert taken.status_code == 412


async def test_a_refused_description_has_no_draft_until_its_examples_are_learnt(
    world: World,
) -> None:
    ordered = await world.front.post(GENERATE, STRANGE)
    assert ordered.status_code == 202
    job = ordered.json()
    assert job["digest"] is None
    assert job["learning"]["serves"] is None
    assert (await world.front.chat(adapter="surname")).status_code == 404
    world.learner.end.set()
    end = await world.ended(job)
    assert end["learning"]["serves"] == "learnt"
    answered = (await world.front.chat(adapter="surname")).json()["adapter"]
    assert answered["digest"] == end["digest"]


async def test_a_refused_description_under_a_name_that_is_taken_trains_nothing(
    world: World,
) -> None:
    first = (await world.front.post(GENERATE, STRANGE)).json()
    again = (await world.front.post(GENERATE, STRANGE)).json()
    assert again["id"] == first["id"]
    world.learner.end.set()
    await world.ended(first)
    taken = await world.front.post(GENERATE, STRANGE)
    assert (taken.status_code, taken.json()["error"]["code"]) == (412, "revision_conflict")
    other = await world.front.post(GENERATE, {**STRANGE, "examples": PAIRS[::-1]})
    assert other.status_code == 412
    assert len(world.learner.budgets) == 1


async def test_a_refused_description_of_a_name_is_learnt_again_with_more_time(
    world: World,
) -> None:
    first = await world.learnt(timed_out=True, description="something strange", budget_s=10)
    world.learner.teaches = "learnt in full"
    second = await world.learnt(timed_out=False, description="something strange", budget_s=20)
    assert second["status"] == "succeeded"
    assert second["digest"] != first["digest"]


async def test_a_refused_description_whose_examples_gain_nothing_never_answers(
    world: World,
) -> None:
    job = (await world.front.post(GENERATE, STRANGE)).json()
    world.learner.gains = False
    world.learner.end.set()
    end = await world.ended(job)
    assert (end["status"], end["error"]["code"]) == ("failed", "nothing_learnt")
    assert (await world.front.client.get("/v1/adapters/surname")).status_code == 404


async def test_force_serves_the_draft_of_a_refused_description(world: World) -> None:
    job = (await world.front.post(GENERATE, {**STRANGE, "force": True})).json()
    assert job["learning"]["serves"] == "draft"
    assert (await world.front.chat(adapter="surname")).status_code == 200


async def test_who_waits_gets_the_card_of_what_was_learnt(world: World) -> None:
    world.learner.end.set()
    answer = await world.order(wait=True)
    assert answer.status_code == 201
    assert answer.json()["provenance"]["refinement"]["gained"] is True
    assert answer.headers["etag"] == f'"{answer.json()["digest"]}"'


async def test_a_chat_is_answered_with_its_examples_as_turns_and_later_by_what_was_learnt(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = (await world.front.chat(adapter=SURNAME)).json()["adapter"]
    assert (first["name"], first["digest"]) == (None, None)
    assert first["chosen_by"]["serves"] == "turns"
    assert first["chosen_by"]["refinement"]["finished"] is False
    assert "method" not in first["chosen_by"]  # of a draft, which has not answered
    sent = world.front.engine.requests[-1]
    assert sent.adapter is None
    assert sent.prompt_ids == _with_turns(tokenizer, "the surname", PAIRS)
    world.learner.end.set()
    end = await world.ended(first["chosen_by"]["job"])
    second = (await world.front.chat(adapter=SURNAME)).json()["adapter"]
    assert second["digest"] == end["digest"]
    assert second["chosen_by"]["serves"] == "learnt"
    assert second["chosen_by"]["refinement"]["finished"] is True
    assert "job" not in second["chosen_by"]
    sent = world.front.engine.requests[-1]
    assert sent.prompt_ids == _with_turns(tokenizer, "", [])


async def test_what_was_learnt_answers_no_chat_that_turns_answer_better(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As after a few steps on a busy server. By its name it answers: there is nothing else."""
    world.learner.held_out = 0, 0.1  # of four; turns have two
    end = await world.learnt(timed_out=True, name=None)
    world.learner.held_out = 1, 2.0  # four pairs do not tell one and two apart
    told = (await world.front.chat(adapter=SURNAME)).json()["adapter"]
    assert (told["name"], told["chosen_by"]["serves"]) == (None, "turns")
    expected = _with_turns(tokenizer, "the surname", PAIRS)
    assert world.front.engine.requests[-1].prompt_ids == expected
    named = (await world.front.chat(adapter=end["adapter"])).json()["adapter"]
    assert named["digest"] == end["digest"]
    again = await world.learnt(timed_out=False, name=None, budget_s=90)
    later = (await world.front.chat(adapter=SURNAME)).json()["adapter"]
    assert (later["digest"], later["chosen_by"]["serves"]) == (again["digest"], "learnt")


@pytest.mark.parametrize(("gains", "serves"), [(True, "learnt"), (False, "turns")])
async def test_of_a_card_that_does_not_know_turns_only_what_was_learnt_answers(
    world: World, gains: bool, serves: str
) -> None:
    """An earlier version wrote it."""
    world.learner.gains = gains
    end = await world.learnt(timed_out=False, name=None)

    def forget(card: AdapterCard) -> CardEdit:
        told = dict(record_of(card))
        del told["held_out"], told["beats_turns"]
        provenance = {**card.provenance, "refinement": told}
        return CardEdit(card.description, card.examples, card.defaults, provenance)

    world.front.store.edit(end["adapter"], forget)
    answer = (await world.front.chat(adapter=SURNAME)).json()["adapter"]
    assert answer["chosen_by"]["serves"] == serves


async def test_turns_come_in_streams_and_beside_tools(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    events = await world.front.chat_events(adapter=SURNAME, tools=[tool], tool_choice="none")
    assert events[0]["adapter"]["chosen_by"]["turns"] == 2
    assert world.front.engine.requests[-1].prompt_ids == _with_turns(
        tokenizer, "the surname", PAIRS
    )


async def test_turns_leave_a_key_with_few_tokens_room_for_the_answer(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    n_all = len(_with_turns(tokenizer, "the surname", PAIRS))
    key = replace(ApiKey.of("few", Scope.INFER), tokens_per_minute=n_all + 4)
    http = HttpConfig(api_keys=(key,))
    with learning_front(tokenizer, base_spec, tmp_path, ScriptedLearner, http=http) as front:
        front.headers = {"authorization": "Bearer few"}
        answer = await front.chat(adapter=SURNAME)
        assert answer.status_code == 200, answer.text
        sent = front.engine.requests[-1]
        assert sent.prompt_ids == _with_turns(tokenizer, "the surname", PAIRS[:1])
        assert sent.sampling.max_tokens == n_all + 4 - len(sent.prompt_ids)


@pytest.mark.parametrize("limit", ["max_jobs = 1", "max_adapters = 1"])
async def test_a_chat_has_turns_where_its_tenant_may_have_no_more(
    tokenizer: PreTrainedTokenizerFast,
    base_spec: BaseSpec,
    tmp_path: Path,
    limit: str,
) -> None:
    digest = hashlib.sha256(b"acme-key").hexdigest()
    table = (
        f'[[key]]\nname = "acme"\nsha256 = "{digest}"\nscope = "admin"\ntenant = "acme"\n{limit}\n'
    )
    http = HttpConfig(api_keys=parse_keys(table))
    with learning_front(tokenizer, base_spec, tmp_path, ScriptedLearner, http=http) as front:
        front.headers = {"authorization": "Bearer acme-key"}
        assert (await front.post(GENERATE, ORDER)).status_code == 202
        other = {**SURNAME, "examples": PAIRS[::-1]}
        answer = await front.chat(adapter=other)
        assert answer.status_code == 200, answer.text
        told = answer.json()["adapter"]["chosen_by"]
        assert told == {"description": "the surname", "serves": "turns", "turns": 2}
        assert (await front.complete(adapter=other)).status_code in (403, 429)


async def test_a_system_message_stays_first_and_the_chats_own_turns_come_last(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
    ]
    await world.front.chat(adapter=SURNAME, messages=chat)
    expected = _with_turns(tokenizer, "the surname", PAIRS, before=chat[:1], after=chat[1:])
    assert world.front.engine.requests[-1].prompt_ids == expected


async def test_of_more_turns_than_the_context_holds_the_first_half_is_sent(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = [{"prompt": f"{'x' * 20}{i}", "answer": "y"} for i in range(32)]
    wish = {"description": "the surname", "examples": pairs}
    room = world.front.engine.max_model_len - 8
    lengths = [len(_with_turns(tokenizer, "the surname", pairs[:n])) for n in (32, 16, 8, 4)]
    assert lengths[0] > room
    n_sent = next(n for n, length in zip((32, 16, 8, 4), lengths, strict=True) if length <= room)
    answer = await world.front.chat(adapter=wish, max_tokens=8)
    assert answer.status_code == 200, answer.text
    sent = world.front.engine.requests[-1].prompt_ids
    assert sent == _with_turns(tokenizer, "the surname", pairs[:n_sent])
    assert answer.json()["adapter"]["chosen_by"]["turns"] == n_sent


async def test_a_chat_that_leaves_no_room_for_an_example_says_so(world: World) -> None:
    room = world.front.engine.max_model_len - 20
    chat = [{"role": "user", "content": "x " * (room // 2)}]
    pairs = [{"prompt": f"{i} {'long ' * 15}", "answer": "y"} for i in range(2)]
    wish = {"description": "the surname", "examples": pairs}
    alone = await world.front.chat(messages=chat, max_tokens=1)
    assert alone.status_code == 200, alone.text
    answer = await world.front.chat(adapter=wish, messages=chat, max_tokens=1)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "examples" in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"max_tokens": 8}),
        ("/v1/responses", {"input": "hi", "messages": None}),
    ],
)
async def test_every_kind_of_chat_has_the_turns(
    world: World, tokenizer: PreTrainedTokenizerFast, path: str, body: dict[str, object]
) -> None:
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "adapter": SURNAME}
    sent = {name: value for name, value in {**chat, **body}.items() if value is not None}
    answer = await world.front.post(path, sent)
    assert answer.status_code == 200, answer.text
    expected = _with_turns(tokenizer, "the surname", PAIRS)
    assert world.front.engine.requests[-1].prompt_ids == expected


async def test_tokens_are_counted_with_the_turns(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "adapter": SURNAME}
    expected = _with_turns(tokenizer, "the surname", PAIRS)
    told = (await world.front.post("/tokenize", chat)).json()
    assert tuple(told["tokens"]) == expected
    counted = (await world.front.post("/v1/messages/count_tokens", chat)).json()
    assert counted["input_tokens"] == len(expected)


async def test_a_completion_has_no_turns_and_is_answered_by_the_draft(world: World) -> None:
    first = (await world.front.complete(adapter=SURNAME)).json()["adapter"]
    assert first["chosen_by"]["serves"] == "draft"
    used = world.front.engine.requests[-1].adapter
    assert used is not None
    assert used.digest == first["digest"]
    strange = await world.front.complete(adapter=STRANGE_CHAT)
    error = strange.json()["error"]
    assert (strange.status_code, error["code"]) == (422, "description_out_of_distribution")
    assert error["job"] in error["message"]


async def test_a_chat_that_waits_is_answered_by_what_was_learnt(world: World) -> None:
    world.learner.end.set()
    wish = {**STRANGE_CHAT, "wait": True}
    answer = (await world.front.chat(adapter=wish)).json()["adapter"]
    assert answer["chosen_by"]["refinement"]["gained"] is True


async def test_a_chat_whose_description_is_refused_has_its_examples_as_turns(
    world: World, tokenizer: PreTrainedTokenizerFast
) -> None:
    first = (await world.front.chat(adapter=STRANGE_CHAT)).json()["adapter"]
    assert (first["name"], first["chosen_by"]["serves"]) == (None, "turns")
    expected = _with_turns(tokenizer, "something strange", PAIRS)
    assert world.front.engine.requests[-1].prompt_ids == expected
    world.learner.end.set()
    end = await world.ended(first["chosen_by"]["job"])
    second = (await world.front.chat(adapter=STRANGE_CHAT)).json()["adapter"]
    assert second["digest"] == end["digest"]


async def test_chats_do_not_learn_in_vain_twice(world: World) -> None:
    """A refused description has no draft that could say that its job came to nothing."""
    world.learner.gains = False
    world.learner.end.set()
    first = (await world.front.chat(adapter=STRANGE_CHAT)).json()["adapter"]
    end = await world.ended(first["chosen_by"]["job"])
    assert end["error"]["code"] == "nothing_learnt"
    second = (await world.front.chat(adapter=STRANGE_CHAT)).json()["adapter"]
    assert second["chosen_by"] == {
        "description": "something strange",
        "serves": "turns",
        "turns": 2,
    }
    assert len(world.learner.budgets) == 1
    world.learner.gains = True  # who orders it all the same is obeyed, and then chats have it
    ordered = (await world.front.post(GENERATE, {**STRANGE, "name": None})).json()
    end = await world.ended(ordered)
    third = (await world.front.chat(adapter=STRANGE_CHAT)).json()["adapter"]
    assert third["digest"] == end["digest"]


@pytest.mark.parametrize("wish", [SURNAME, STRANGE_CHAT], ids=["draft", "refused"])
async def test_a_chat_whose_job_failed_does_not_start_it_again_at_once(
    world: World, wish: dict[str, object]
) -> None:
    world.learner.error = RuntimeError("broken")
    world.learner.end.set()
    first = (await world.front.chat(adapter=wish)).json()["adapter"]
    assert (await world.ended(first["chosen_by"]["job"]))["status"] == "failed"
    second = await world.front.chat(adapter=wish)
    assert second.status_code == 200, second.text
    assert second.json()["adapter"]["chosen_by"]["serves"] == "turns"
    assert len(world.learner.budgets) == 1
    job = (await world.front.post(GENERATE, {**wish, "probe": False})).json()
    assert (await world.ended(job))["status"] == "failed"  # who orders it is obeyed
    assert len(world.learner.budgets) == 2


@pytest.mark.parametrize("error", [None, OutOfTime()], ids=["nothing", "out of time"])
async def test_a_chat_that_waits_in_vain_has_turns(world: World, error: Exception | None) -> None:
    world.learner.gains, world.learner.error = False, error
    world.learner.end.set()
    answer = await world.front.chat(adapter={**STRANGE_CHAT, "wait": True})
    assert answer.status_code == 200, answer.text
    told = answer.json()["adapter"]["chosen_by"]
    assert (told["serves"], "job" in told) == ("turns", False)


async def test_a_chat_has_turns_where_no_job_may_start(world: World) -> None:
    for number in range(4):
        assert (await world.order(name=f"n{number}")).status_code == 202
    answer = (await world.front.chat(adapter=STRANGE_CHAT)).json()["adapter"]
    assert answer["chosen_by"] == {
        "description": "something strange",
        "serves": "turns",
        "turns": 2,
    }


def _with_turns(
    tokenizer: PreTrainedTokenizerFast,
    sentence: str,
    pairs: Sequence[dict[str, str]],
    *,
    before: Sequence[dict[str, str]] = (),
    after: Sequence[dict[str, str]] = ({"role": "user", "content": "hi"},),
) -> tuple[int, ...]:
    """What transformers makes of the chat with examples as turns."""
    said = [
        {"role": role, "content": pair[field]}
        for pair in pairs
        for role, field in (("user", "prompt"), ("assistant", "answer"))
    ]
    if said:
        said[0]["content"] = f"{sentence}\n{said[0]['content']}"
    chat = [*before, *said, *after]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tuple(ids)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"examples": PAIRS[:1]}, 400, "examples"),
        ({"examples": PAIRS * 40}, 400, "examples"),
        ({"examples": [{"prompt": "a"}, {"prompt": "b", "answer": "c"}]}, 400, None),
        ({"examples": [{"prompt": "unfit", "answer": "x"}, PAIRS[0]]}, 400, "examples"),
        ({"budget_s": 101}, 400, "budget_s"),
        ({"examples": None, "budget_s": 5}, 400, "budget_s"),
        ({"examples": None, "wait": True}, 400, "wait"),
    ],
)
async def test_what_cannot_be_learnt_from_is_refused_and_leaves_nothing(
    world: World, fields: dict[str, object], status: int, param: str | None
) -> None:
    answer = await world.order(**fields)
    assert answer.status_code == status, answer.text
    if param is not None:
        assert answer.json()["error"]["param"] == param
    assert not world.front.store.list()


@pytest.mark.parametrize(
    "adapter",
    [
        {"description": "x", "examples": PAIRS[:1]},
        {"description": "x", "examples": [["a", "b"], ["c", "d"]]},
        {"description": "x", "examples": [{"prompt": "", "answer": "b"}, PAIRS[0]]},
        {"description": "x", "wait": 1},
    ],
)
async def test_a_chats_examples_are_checked(world: World, adapter: dict[str, object]) -> None:
    answer = await world.front.chat(adapter=adapter)
    assert answer.json()["error"]["code"] == "invalid_adapter"


async def test_a_budget_is_a_deadline_that_leaves_time_to_store(world: World) -> None:
    await world.order(budget_s=40)
    await world.begun()
    assert 30 < world.learner.budgets[0] < 40


async def test_a_tenant_may_have_four_jobs_that_learn(world: World) -> None:
    for number in range(4):
        assert (await world.order(name=f"n{number}")).status_code == 202
    fifth = await world.order(name="n5")
    assert (fifth.status_code, fifth.json()["error"]["code"]) == (429, "too_many_learning_jobs")
    assert "retry-after" in fifth.headers
    assert not world.front.store.has_name("n5")


async def test_tenants_take_turns_in_learning(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    learners: list[ScriptedLearner] = []

    def make(generator: ScriptedGenerator) -> ScriptedLearner:
        learners.append(ScriptedLearner(generator))
        return learners[0]

    names = ("acme", "umbra")
    keys = "\n".join(
        f'[[key]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
        f'scope = "admin"\ntenant = "{name}"'
        for name in names
    )
    http = HttpConfig(api_keys=parse_keys(keys))
    with learning_front(tokenizer, base_spec, tmp_path, make, http=http) as front:
        world, jobs = World(front, learners[0]), []
        for tenant, description in (
            *(("acme", f"one of acme's: {number}") for number in range(3)),
            ("umbra", "the one of umbra's"),
        ):
            front.headers["authorization"] = f"Bearer {tenant}"
            answer = await world.order(description=description, name="taught-" + description[-1])
            assert answer.status_code == 202, answer.text
            jobs.append(answer.json()["id"])
            if len(jobs) == 1:
                await world.begun()
        world.learner.end.set()
        started = front.app.state.parts.jobs
        for job in jobs:
            assert await started.wait(started.get(job, EVERY_ADAPTER), 60)
        assert [each[-1] for each in world.learner.descriptions] == ["0", "s", "1", "2"]


async def test_a_learner_that_fails_leaves_the_draft(world: World) -> None:
    job = (await world.order()).json()
    world.learner.error = RuntimeError("no memory at /secret/path")
    world.learner.end.set()
    end = await world.ended(job)
    assert end["status"] == "failed"
    assert end["digest"] == job["digest"]
    assert "/secret" not in json.dumps(end)
    assert (await world.front.chat(adapter="surname")).status_code == 200


async def test_a_draft_whose_job_a_restart_cut_off_stays_and_learns_again(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    with learning_front(tokenizer, base_spec, tmp_path, ScriptedLearner) as front:
        job = (await front.post(GENERATE, ORDER)).json()
    with learning_front(tokenizer, base_spec, tmp_path, ScriptedLearner) as front:
        assert (await front.client.get(f"/v1/jobs/{job['id']}")).status_code == 404
        assert (await front.chat(adapter="surname")).json()["adapter"]["digest"] == job["digest"]
        again = (await front.post(GENERATE, ORDER)).json()
        assert again["digest"] == job["digest"]


async def test_a_job_that_a_key_may_not_see_is_missing_and_not_lost(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    keys = (ApiKey.of("admin-secret", Scope.ADMIN), ApiKey.of("infer-secret", Scope.INFER))
    http = HttpConfig(api_keys=keys)
    with learning_front(tokenizer, base_spec, tmp_path, ScriptedLearner, http=http) as front:
        front.headers = {"authorization": "Bearer admin-secret"}
        job = (await front.post(GENERATE, ORDER)).json()
        shown = await front.client.get(f"/v1/jobs/{job['id']}", headers=front.headers)
        assert shown.json()["status"] == "running"
        reader = {"authorization": "Bearer infer-secret"}
        for path in ("", "/events"):
            told = [
                await front.client.get(f"/v1/jobs/{id}{path}", headers=reader)
                for id in (job["id"], "job-0")
            ]
            assert [answer.status_code for answer in told] == [404, 404]
            assert told[0].text.replace(job["id"], "job-0") == told[1].text


async def test_a_draft_that_was_left_for_another_base_is_made_anew(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    order = {**ORDER, "name": None}
    with learning_front(tokenizer, base_spec, tmp_path, ScriptedLearner) as front:
        first = (await front.post(GENERATE, order)).json()
    other = BaseSpec.of(tiny_model(seed=1), "tiny/llama")
    with learning_front(tokenizer, other, tmp_path, ScriptedLearner) as front:
        second = (await front.post(GENERATE, order)).json()
        assert second["adapter"] == first["adapter"]
        card = (await front.client.get(f"/v1/adapters/{second['adapter']}")).json()
        assert card["base_fingerprint"] == other.fingerprint
        assert (await front.chat(adapter=second["adapter"])).status_code == 200


async def test_what_a_refused_description_had_learnt_for_another_base_is_learnt_anew(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> None:
    order = {**STRANGE, "name": None, "wait": True}

    def make(generator: ScriptedGenerator) -> ScriptedLearner:
        learner = ScriptedLearner(generator)
        learner.end.set()
        return learner

    with learning_front(tokenizer, base_spec, tmp_path, make) as front:
        first = (await front.post(GENERATE, order)).json()
    other = BaseSpec.of(tiny_model(seed=1), "tiny/llama")
    with learning_front(tokenizer, other, tmp_path, make) as front:
        answer = await front.post(GENERATE, order)
        assert answer.status_code == 201, answer.text
        assert answer.json()["name"] == first["name"]
        assert answer.json()["base_fingerprint"] == other.fingerprint


async def test_a_server_that_learns_nothing_says_so(front: Front) -> None:
    answer = await front.chat(adapter={"description": "x", "examples": PAIRS})
    assert answer.json()["error"]["code"] == "feature_not_enabled"


WORDS = ("red", "blue", "green", "plum", "gold", "grey", "pink", "teal", "navy", "rust")


def _learner(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, share: BackgroundShare
) -> tuple[TrainingThread, ExampleLearner]:
    def make(rest: Callable[[], None]) -> TrainingEngine:
        weights = ModelWeights(model)
        return TrainingEngine(FrozenModel(model.config, weights, dtype=torch.float32, rest=rest))

    thread = TrainingThread(make, share, 1)
    return thread, ExampleLearner(thread, tokenizer, "tiny/llama", lambda request: ())


async def test_a_base_without_a_chat_template_learns_no_pairs_and_says_what_helps(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    thread, learner = _learner(tiny_model("llama"), plain, BackgroundShare(1.0, lambda: False))
    spec = BaseSpec.of(tiny_model("llama"), "tiny/llama")
    with (
        contextlib.closing(thread),
        learning_front(plain, spec, tmp_path, lambda generator: learner) as front,
    ):
        pairs = [{"prompt": word, "answer": "yes"} for word in WORDS[:4]]
        answer = await front.post(GENERATE, {**ORDER, "examples": pairs})
        assert answer.status_code == 400, answer.text
        assert "no chat template" in answer.json()["error"]["message"]
        assert "chat_template.jinja" in answer.json()["error"]["message"]


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.nightly)])
async def test_pairs_are_learnt_on_the_base_and_hold_for_words_not_seen(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str
) -> None:
    """The real learner on a tiny base; transformers' own forward with W + B·A is the judge."""
    model = tiny_model(family, initializer_range=0.1)
    thread, learner = _learner(model, tokenizer, BackgroundShare(1.0, lambda: False))
    pairs = [{"prompt": word, "answer": "yes"} for word in WORDS[:6]]
    base_spec = BaseSpec.of(tiny_model(family, initializer_range=0.1), "tiny/llama")
    with (
        contextlib.closing(thread),
        learning_front(tokenizer, base_spec, tmp_path, lambda generator: learner) as front,
    ):
        order = {**ORDER, "description": "strange", "examples": pairs, "budget_s": 10}
        job = (await front.post(GENERATE, order)).json()
        states = await World(front, ScriptedLearner(ScriptedGenerator(base_spec))).events(job["id"])
        assert states[-1]["learning"]["gained"] is True, states[-1]
        card = front.store.get("surname")
        assert card.defaults == {"system_prompt": "strange"}
        told = card.provenance["refinement"]
        assert isinstance(told, dict)
        assert told["start"] == "base"
        untouched = tiny_model(family, initializer_range=0.1)
        before = _unseen_nll(untouched, tokenizer)
        with front.store.acquire("surname") as lease:
            for name, plan in lease.plan.modules.items():
                assert plan.a is not None
                assert plan.b is not None
                untouched.get_submodule(name).weight += plan.b @ plan.a
        assert _unseen_nll(untouched, tokenizer) < 0.5 * before


async def test_a_job_beside_requests_that_finds_no_time_says_so_and_its_draft_stays(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(initializer_range=0.1)
    thread, learner = _learner(model, tokenizer, BackgroundShare(1e-6, lambda: True))
    spec = BaseSpec.of(tiny_model(initializer_range=0.1), "tiny/llama")
    with (
        contextlib.closing(thread),
        learning_front(tokenizer, spec, tmp_path, lambda generator: learner) as front,
    ):
        pairs = [{"prompt": word, "answer": "yes"} for word in WORDS[:6]]
        job = (await front.post(GENERATE, {**ORDER, "examples": pairs, "budget_s": 1})).json()
        world = World(front, ScriptedLearner(ScriptedGenerator(spec)))
        end = await world.ended(job)
        assert (end["status"], end["error"]["code"]) == ("failed", "out_of_time")
        assert "budget_s" in end["error"]["message"]
        assert (await front.chat(adapter="surname")).json()["adapter"]["digest"] == job["digest"]


async def test_a_budget_without_time_for_a_score_is_refused_with_one_that_has_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A chat, which chose no budget, is answered with turns."""
    model = tiny_model(initializer_range=0.1)
    thread, learner = _learner(model, tokenizer, BackgroundShare(1.0, lambda: False))
    thread.speed = Speed(2.0, time.monotonic())  # as beside many requests
    spec = BaseSpec.of(tiny_model(initializer_range=0.1), "tiny/llama")
    with (
        contextlib.closing(thread),
        learning_front(tokenizer, spec, tmp_path, lambda generator: learner) as front,
    ):
        refused = await front.post(GENERATE, {**ORDER, "budget_s": 5})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "examples")
        message = refused.json()["error"]["message"]
        needed = int(message.partition("give budget_s ")[2].partition(" ")[0])
        assert needed > 5, message
        assert not front.store.list()
        told = (await front.chat(adapter=SURNAME)).json()["adapter"]
        assert told["chosen_by"]["serves"] == "turns"
        accepted = await front.post(GENERATE, {**ORDER, "budget_s": needed + 1})
        assert accepted.status_code == 202, accepted.text
        thread.speed = Speed(2.0, time.monotonic() - 61)  # which says nothing of now
        accepted = await front.post(GENERATE, {**ORDER, "name": "late", "budget_s": 5})
        assert accepted.status_code == 202, accepted.text


@torch.inference_mode()
def _unseen_nll(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Nats per answer token, on words that were in no example."""
    losses = []
    for word in WORDS[6:]:
        chat = Chat(
            [
                Message(role="system", content="strange"),
                Message(role="user", content=word),
                Message(role="assistant", content="yes"),
            ]
        )
        example = tokenise(chat, tokenizer, max_len=100, where="here")
        tokens = torch.tensor([example.tokens])
        labels = torch.where(torch.tensor([example.learn]), tokens, -100)
        losses.append(float(model(tokens, labels=labels).loss))
    return sum(losses) / len(losses)
