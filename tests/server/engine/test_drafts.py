"""Drafts change how many tokens a step computes, and no answer."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.api.serving.text_generation.structured_output import json_grammar
from loraplex_server.engine.drafts.row_cost import MAX_ROWS, RowCost
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import TokenEvent, TokenLogprobs
from loraplex_server.engine.requests.grammar import CompiledGrammar, GrammarSpec, TokenTrie
from loraplex_server.engine.requests.guesses import Guesses
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.routed_plans import lora_plan, mixlora_plan
from tests.support.bases.architectures import VOCAB_SIZE, tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.engines import Answer, PlanLease, running_engine

PROMPTS = [(5, 9, 200, 31, 7), (17,), tuple(range(40, 80)), (250, 1, 2)]
GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
RANDOM = SamplingParams(max_tokens=60, temperature=0.8, top_p=0.95, seed=11, ignore_eos=True)
_SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 99999},
        "text": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["the first kind", "quite another one"]},
    },
    "required": ["number", "text", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", eos_token_id=2, max_position_embeddings=512)


@pytest.fixture(scope="module")
def plans(model: PreTrainedModel) -> list[AdapterPlan | None]:
    routed = mixlora_plan(model, n_experts=4, top_k=2, rank=2, seed=5)
    return [None, lora_plan(model, rank=4, seed=1), routed, lora_plan(model, rank=17, seed=2)]


@pytest.fixture(scope="module")
def grammar(model: PreTrainedModel) -> CompiledGrammar:
    trie = TokenTrie(tiny_tokenizer().backend_tokenizer.to_str(), model.config.vocab_size, {2})
    return trie.compile(GrammarSpec(json_grammar(_SCHEMA)))


def ask(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Generate for all requests at once."""

    async def one(request: GenerationRequest) -> Answer:
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        engine.submit(request, events.put_nowait)
        answer = Answer()
        while not answer.events or answer.finish is None:
            answer.events.append(await events.get())
            answer.token_ids += answer.last.token_ids
        return answer

    async def run() -> list[Answer]:
        return list(await asyncio.gather(*map(one, requests)))

    return asyncio.run(run())


def _requests(
    engine: Engine,
    plans: Sequence[AdapterPlan | None],
    sampling: SamplingParams,
    grammar: CompiledGrammar | None = None,
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"r{index}",
            prompt,
            sampling,
            None if plan is None else PlanLease(engine.packer.prepare(plan)),  # type: ignore[arg-type]
            grammar=grammar,
        )
        for index, (prompt, plan) in enumerate(zip(PROMPTS, plans, strict=True))
    ]


def _predicting(
    requests: Sequence[GenerationRequest], answers: Sequence[Answer], n_right: int
) -> list[GenerationRequest]:
    """Predict the known answers, with a wrong token after every ``n_right`` right ones."""
    return [
        replace(
            request,
            prediction_ids=tuple(
                (token + 1) % VOCAB_SIZE if index % (n_right + 1) == n_right else token
                for index, token in enumerate(answer.token_ids)
            ),
        )
        for request, answer in zip(requests, answers, strict=True)
    ]


def _facts(answer: Answer) -> object:
    entries: list[TokenLogprobs] = [e for event in answer.events for e in event.logprobs]
    return answer.token_ids, answer.finish, answer.last.stop_token, entries


_SAMPLINGS = {
    "greedy": GREEDY,
    "random": RANDOM,
    "logprobs": replace(RANDOM, logprobs=3),
    "penalties": replace(
        RANDOM, frequency_penalty=0.7, repetition_penalty=1.2, logit_bias={7: 4.0, 9: -100.0}
    ),
    "greedy penalties": replace(GREEDY, presence_penalty=1.5),
    "bad words": replace(RANDOM, bad_words=((7, 8), (31,))),
    "stop tokens": replace(RANDOM, min_tokens=9, stop_token_ids=frozenset(range(0, 300, 9))),
}


@pytest.mark.parametrize("sampling", _SAMPLINGS.values(), ids=_SAMPLINGS)
def test_right_and_wrong_drafts_change_no_token(
    sampling: SamplingParams, model: PreTrainedModel, plans: list[AdapterPlan | None]
) -> None:
    with running_engine(model, drafts="off") as engine:
        requests = _requests(engine, plans, sampling)
        wanted = ask(engine, requests)
        n_steps = engine.stats().n_steps
        assert engine.stats().n_drafted_tokens == 0
    for n_right in (1000, 9):
        with running_engine(model, prefix_cache=False) as engine:
            predicting = _predicting(requests, wanted, n_right)
            together = ask(engine, predicting)
            stats = engine.stats()
            alone = [ask(engine, [request])[0] for request in predicting]
            assert engine.loop.kv_cache.n_pages_held == 0
        assert [*map(_facts, together)] == [*map(_facts, wanted)]
        assert [*map(_facts, alone)] == [*map(_facts, wanted)]
        assert 0 < stats.n_accepted_tokens <= stats.n_drafted_tokens
        assert n_right < 1000 or stats.n_steps < n_steps
        n_accepted = sum(answer.last.n_accepted for answer in together)
        assert n_accepted == stats.n_accepted_tokens


@pytest.mark.parametrize(
    ("logprobs", "limits"),
    [(None, {}), (2, {"max_batch_size": 1}), (2, {"max_step_tokens": 3})],
    ids=["all at once", "one row", "three tokens"],
)
def test_drafts_follow_a_grammar_and_its_forced_tokens(
    logprobs: int | None,
    limits: dict[str, int],
    model: PreTrainedModel,
    plans: list[AdapterPlan | None],
    grammar: CompiledGrammar,
) -> None:
    sampling = SamplingParams(max_tokens=200, temperature=1.2, seed=3, logprobs=logprobs)
    with running_engine(model, drafts="off") as engine:
        requests = _requests(engine, plans, sampling, grammar)
        wanted = ask(engine, requests)
        n_steps = engine.stats().n_steps
    for n_right in (1000, 5):
        with running_engine(model, **limits) as engine:
            found = ask(engine, _predicting(requests, wanted, n_right))
            assert n_right < 1000 or limits or engine.stats().n_steps < n_steps
            assert engine.stats().n_accepted_tokens > 0
        assert [*map(_facts, found)] == [*map(_facts, wanted)]


def test_tokens_that_a_grammar_forces_are_drafts_where_each_needs_its_logits(
    model: PreTrainedModel, grammar: CompiledGrammar
) -> None:
    """With log-probabilities there is no jump-forward."""
    sampling = SamplingParams(max_tokens=200, temperature=1.2, seed=3, logprobs=0)
    with running_engine(model) as engine:
        (answer,) = ask(engine, [GenerationRequest("r", (5, 9), sampling, grammar=grammar)])
        stats = engine.stats()
    assert stats.n_accepted_tokens > len(answer.token_ids) / 4
    assert stats.n_steps < len(answer.token_ids)


def test_a_request_without_drafts_gets_none(model: PreTrainedModel) -> None:
    with running_engine(model) as engine:
        (with_drafts,) = ask(engine, [GenerationRequest("a", (3,) * 30, GREEDY)])
        assert with_drafts.last.n_drafted > 0
        n_drafted = engine.stats().n_drafted_tokens
        (without,) = ask(engine, [GenerationRequest("b", (3,) * 30, GREEDY, drafts=False)])
        assert engine.stats().n_drafted_tokens == n_drafted
    assert without.last.n_drafted == 0
    assert without.token_ids == with_drafts.token_ids


def test_cached_pages_hold_no_refused_token(model: PreTrainedModel) -> None:
    """The next turn reads pages that drafts, mostly wrong ones, were computed in."""
    prompt = tuple(range(60, 75))
    with running_engine(model, drafts="off", prefix_cache=False) as engine:
        (first,) = ask(engine, [GenerationRequest("a", prompt, RANDOM)])
        turn = (*prompt, *first.token_ids, 9)
        (wanted,) = ask(engine, [GenerationRequest("b", turn, RANDOM)])
    with running_engine(model) as engine:
        request = GenerationRequest("a", prompt, RANDOM)
        (predicted,) = ask(engine, _predicting([request], [first], 9))
        assert predicted.last.n_drafted > predicted.last.n_accepted > 0
        (found,) = ask(engine, [GenerationRequest("b", turn, RANDOM)])
    assert found.last.n_cached >= len(turn) - 32
    assert found.token_ids == wanted.token_ids


def test_guesses_are_what_followed_the_last_tokens() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4]
    guesses = Guesses((), text)
    assert guesses.read(text, 3) == [5, 6, 7]
    assert guesses.read([*text, 5], 3) == [6, 7, 8]  # goes on where the last ones ended
    assert guesses.read([*text, 5, 99], 3) == []
    repeating = [7, 1, 2, 1, 2, 1, 2]
    assert Guesses((), repeating).read(repeating, 5) == [1, 2, 1, 2, 1]


def test_guesses_follow_a_prediction_from_its_beginning_and_find_back_to_it() -> None:
    prediction, prompt = [20, 21, 22, 23, 24, 25, 26, 27], [1, 2]
    guesses = Guesses(prediction, prompt)
    assert guesses.read([*prompt, 20], 3) == [21, 22, 23]
    assert guesses.read([*prompt, 20, 21, 90], 3) == []
    assert guesses.read([*prompt, 20, 21, 90, 23, 24, 25], 5)[:2] == [26, 27]


def test_virtual_tokens_are_never_guessed() -> None:
    text = [-1, -2, 5, 6, 7, -1, 5, 6, 7]
    assert Guesses((), text).read(text, 4) == []


def test_wrong_guesses_lower_the_rate_and_rest_restores_it() -> None:
    guesses = Guesses((), ())
    first = guesses.rate
    for _ in range(30):
        guesses.learn(1, 0)
    assert guesses.rate < 0.01
    for _ in range(2000):
        guesses.rest()
    assert first - 0.05 < guesses.rate < first
    guesses.learn(8, 8)
    assert guesses.rate > 0.8


def test_the_cost_of_rows_comes_from_measured_steps() -> None:
    cost, rng = RowCost(), random.Random(3)
    for key in range(30):
        for _ in range(5):
            cost.measured(key, 1, 0, 0.010 * rng.uniform(0.9, 1.1))
            cost.measured(key, 5, 4, 0.030 * rng.uniform(0.9, 1.1))
    assert 2.5 < cost.of(5) < 3.5
    cost.measured(30, 5, 4, 9.0)  # of requests that no step without drafts has measured
    cost.measured(29, 5, 4, 9.0)  # unknown by now
    assert 2.5 < cost.of(5) < 3.6
    assert all(cost.of(n) <= cost.of(n + 1) for n in range(6, MAX_ROWS))
