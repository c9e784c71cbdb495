"""Requests with a grammar inside the engine: forced tokens, preemption, neighbours, errors."""

import asyncio
import json
from dataclasses import replace

import jsonschema_rs
import pytest
from transformers import PreTrainedModel

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_server.api.serving.text_generation.structured_output import json_grammar
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import GrammarTooComplex
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.engine.requests.grammar import CompiledGrammar, GrammarSpec, TokenTrie
from loraplex_server.engine.requests.sampling_params import SamplingParams
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.bases.tiny_tokenizer import tiny_tokenizer
from tests.support.servers.engines import Answer, PlanLease, running_engine

BACKEND = tiny_tokenizer().backend_tokenizer
SCHEMA = {
    "type": "object",
    "properties": {
        "identifier": {"type": "integer", "minimum": 0, "maximum": 99999},
        "description": {"type": "string", "maxLength": 8},
        "category": {"enum": ["the first category", "quite another one"]},
    },
    "required": ["identifier", "description", "category"],
    "additionalProperties": False,
}
LOOSE = SamplingParams(max_tokens=250, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", eos_token_id=2, max_position_embeddings=512)


@pytest.fixture(scope="module")
def trie(model: PreTrainedModel) -> TokenTrie:
    return TokenTrie(BACKEND.to_str(), model.config.vocab_size, {2})


@pytest.fixture(scope="module")
def thing(trie: TokenTrie) -> CompiledGrammar:
    return trie.compile(GrammarSpec(json_grammar(SCHEMA)))


async def ask(
    engine: Engine,
    grammar: CompiledGrammar | None,
    sampling: SamplingParams = LOOSE,
    *,
    plan: AdapterPlan | None = None,
    name: str = "r",
    prompt: tuple[int, ...] = (5, 9, 33),
) -> Answer:
    events: asyncio.Queue[TokenEvent] = asyncio.Queue()
    lease = None if plan is None else PlanLease(engine.packer.prepare(plan))
    request = GenerationRequest(name, prompt, sampling, lease, grammar=grammar)
    engine.submit(request, events.put_nowait)
    answer = Answer()
    while not answer.events or answer.finish is None:
        answer.events.append(await events.get())
        answer.token_ids += answer.last.token_ids
    return answer


def check(answer: Answer) -> str:
    assert answer.finish is FinishReason.STOP, answer.last
    text = BACKEND.decode(answer.token_ids)
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(text)), text
    return str(text)


def test_forced_tokens_change_no_answer_and_save_steps(
    model: PreTrainedModel, thing: CompiledGrammar
) -> None:
    answers, steps = [], []
    for forced in (True, False):
        with running_engine(model, jump_forward=forced, drafts="off") as engine:
            answer = asyncio.run(ask(engine, thing))
            check(answer)
            answers.append(answer.token_ids)
            stats = engine.stats()
            steps.append(stats.n_steps)
            assert stats.n_jump_forward_tokens > len(answer.token_ids) / 3
    assert answers[0] == answers[1]
    assert steps[1] >= len(answers[1])
    assert steps[0] < 0.75 * steps[1]


@pytest.mark.parametrize("fuse", [True, False])
def test_adapters_of_any_rank_answer_within_the_grammar(
    model: PreTrainedModel, thing: CompiledGrammar, fuse: bool
) -> None:
    plans = [None, lora_plan(model, rank=4, seed=1), lora_plan(model, rank=17, seed=2)]

    async def run(engine: Engine) -> list[Answer]:
        greedy = replace(LOOSE, temperature=0.0)
        return await asyncio.gather(
            *(
                ask(engine, thing, sampling, plan=plan, name=f"{index}{sampling.greedy}")
                for index, plan in enumerate(plans)
                for sampling in (LOOSE, greedy)
            )
        )

    with running_engine(model, fuse=fuse) as engine:
        together = asyncio.run(run(engine))
        alone = asyncio.run(ask(engine, thing, plan=plans[2]))
    texts = [check(answer) for answer in together]
    assert len(set(texts)) > 3
    assert together[4].token_ids == alone.token_ids


def test_free_rows_have_the_same_bits_beside_constrained_ones(
    model: PreTrainedModel, thing: CompiledGrammar
) -> None:
    scored = SamplingParams(max_tokens=30, temperature=0.9, seed=5, logprobs=3, ignore_eos=True)

    async def run(engine: Engine, n_constrained: int) -> Answer:
        free, *_ = await asyncio.gather(
            ask(engine, None, scored, name="free"),
            *(
                ask(engine, thing, replace(LOOSE, seed=s), name=str(s))
                for s in range(n_constrained)
            ),
        )
        return free

    with running_engine(model, prefix_cache=False) as engine:
        alone, beside = (asyncio.run(run(engine, n)) for n in (0, 5))
    assert [e.logprobs for e in alone.events] == [e.logprobs for e in beside.events]
    assert alone.token_ids == beside.token_ids


@pytest.mark.parametrize("forced", [True, False], ids=["forced tokens", "one by one"])
def test_a_preempted_answer_goes_on_where_it_was(
    model: PreTrainedModel, thing: CompiledGrammar, forced: bool
) -> None:
    async def run(engine: Engine) -> list[Answer]:
        params = [replace(LOOSE, seed=seed, max_tokens=120) for seed in range(6)]
        params[3] = replace(params[3], logprobs=2)
        return await asyncio.gather(
            *(ask(engine, thing, one, name=str(index)) for index, one in enumerate(params))
        )

    with running_engine(model, jump_forward=not forced) as engine:
        wanted = asyncio.run(run(engine))
        assert engine.stats().n_preemptions == 0
    config = model.config
    page = 2 * config.num_hidden_layers * config.num_key_value_heads * 16 * config.head_dim * 4
    # An answer takes 5 or 6 pages in the end and one in the beginning: 8 are too few for two.
    with running_engine(model, kv_memory_bytes=8 * page, jump_forward=forced) as engine:
        found = asyncio.run(run(engine))
        assert engine.stats().n_preemptions > 0
        assert engine.stats().kv_pages_used == 0
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    assert [e.logprobs for e in found[3].events] == [e.logprobs for e in wanted[3].events]
    for answer in found:
        check(answer)


@pytest.mark.parametrize("forced", [True, False], ids=["forced tokens", "one by one"])
def test_a_prompt_and_answer_from_the_prefix_cache_change_no_constrained_answer(
    model: PreTrainedModel, thing: CompiledGrammar, forced: bool
) -> None:
    prompt = tuple(range(40, 140))
    with running_engine(model, prefix_cache=False) as engine:
        wanted = asyncio.run(ask(engine, thing, prompt=prompt))
        assert wanted.last.n_cached == 0
    check(wanted)
    continued = (*prompt, *wanted.token_ids)
    with running_engine(model, jump_forward=forced) as engine:
        free = asyncio.run(ask(engine, None, replace(LOOSE, max_tokens=1), prompt=prompt))
        assert free.last.n_cached == 0
        again = asyncio.run(ask(engine, thing, prompt=prompt))
        # The first answer's KV is the second prompt's; the grammar begins anew all the same.
        after = asyncio.run(ask(engine, thing, prompt=continued))
    assert again.last.n_cached == 96
    assert again.token_ids == wanted.token_ids
    assert after.last.n_cached > len(prompt)
    with running_engine(model, prefix_cache=False) as engine:
        assert after.token_ids == asyncio.run(ask(engine, thing, prompt=continued)).token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize(
    ("later", "told"),
    [
        (r"/(.|\n)*a.{60}b(.|\n)*/ & /(.|\n)*b.{70}a(.|\n)*/ & /.{500}/", "too many expressions"),
        ("/a+/ & /b+/", "NoExtension"),
    ],
    ids=["explodes", "dead end"],
)
def test_a_grammar_that_fails_on_the_way_fails_its_request_alone(
    model: PreTrainedModel,
    trie: TokenTrie,
    thing: CompiledGrammar,
    temperature: float,
    later: str,
    told: str,
) -> None:
    hostile_one = trie.compile(GrammarSpec(f"start: /[0-9]{{5}}/ LATER\nLATER: {later}"))
    scored = SamplingParams(max_tokens=30, temperature=temperature, seed=5, logprobs=3)
    greedy_or_not = replace(LOOSE, temperature=temperature)

    async def run(engine: Engine, hostile: bool) -> tuple[list[Answer], Answer | None]:
        last = ask(engine, hostile_one, greedy_or_not, name="hostile") if hostile else None
        *others, failed = await asyncio.gather(
            ask(engine, None, scored, name="free"),
            ask(engine, thing, greedy_or_not, name="constrained"),
            last or asyncio.sleep(0),
        )
        return list(others), failed

    with running_engine(model, prefix_cache=False) as engine:
        alone, _ = asyncio.run(run(engine, False))
        beside, failed = asyncio.run(run(engine, True))
        assert engine.alive
        assert engine.stats().kv_pages_used == 0
        again, _ = asyncio.run(run(engine, False))
    assert failed is not None
    assert failed.finish is FinishReason.ERROR
    assert isinstance(failed.last.error, GrammarTooComplex)
    message = str(failed.last.error)
    assert told in message
    assert "simplify" in message
    assert "\n" not in message
    # Until there the grammar was followed. Drafts extend the lexer's tables in smaller pieces, so
    # that the one that explodes may get further.
    assert len(failed.token_ids) == 5 or (told == "too many expressions" and not temperature)
    for others in (beside, again):
        assert [a.token_ids for a in others] == [a.token_ids for a in alone]
        assert [e.logprobs for e in others[0].events] == [e.logprobs for e in alone[0].events]
    check(beside[1])


@pytest.mark.parametrize("limit", [1, 2, 5, 17])
def test_an_answer_is_cut_at_its_limit_also_within_forced_tokens(
    model: PreTrainedModel, thing: CompiledGrammar, limit: int
) -> None:
    with running_engine(model) as engine:
        whole = asyncio.run(ask(engine, thing))
        cut = asyncio.run(ask(engine, thing, replace(LOOSE, max_tokens=limit)))
    assert cut.finish is FinishReason.LENGTH
    assert cut.token_ids == whole.token_ids[:limit]


def test_a_forced_stop_token_ends_the_answer_like_a_sampled_one(
    model: PreTrainedModel, thing: CompiledGrammar
) -> None:
    with running_engine(model) as engine:
        whole = asyncio.run(ask(engine, thing)).token_ids
        stop = whole[4]
        stopped = replace(LOOSE, stop_token_ids=frozenset({stop}))
        answer = asyncio.run(ask(engine, thing, stopped))
    assert answer.finish is FinishReason.STOP
    assert answer.last.stop_token == stop
    assert answer.token_ids == whole[: whole.index(stop)]


def test_an_end_token_is_no_way_out_and_ends_a_grammar_that_may_end(
    model: PreTrainedModel, trie: TokenTrie, thing: CompiledGrammar
) -> None:
    wants_to_end = replace(LOOSE, logit_bias={2: 100.0}, ignore_eos=True)
    digits = trie.compile(GrammarSpec("start: /[0-9]{3,9}/"))
    with running_engine(model) as engine:
        check(asyncio.run(ask(engine, thing, wants_to_end)))
        answer = asyncio.run(ask(engine, digits, wants_to_end))
        longer = asyncio.run(ask(engine, digits, replace(wants_to_end, min_tokens=5)))
    assert answer.finish is longer.finish is FinishReason.STOP
    assert len(BACKEND.decode(answer.token_ids)) == 3
    assert len(longer.token_ids) >= 5
