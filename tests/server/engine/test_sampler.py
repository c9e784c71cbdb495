"""Sampling: filters, penalties, seeds, log-probabilities. Oracle: transformers' processors."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as oracle

from loraplex_server.engine.errors import NoTokenAllowed
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.sampling.sampler import Sampled, Sampler, uniform_of
from loraplex_server.engine.sampling.token_rules import no_token

_EOS = frozenset({2})
_CPU = torch.device("cpu")


def _request(
    prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> Request:
    prompt = prompt or [5, 6]
    sampling = SamplingParams(**({"max_tokens": 100} | params))
    source = GenerationRequest("r", tuple(prompt), sampling)
    request = Request(source, print, [*prompt, *(output or [])], len(prompt))
    request.seed = sampling.seed or 0
    return request


def _sample(logits: torch.Tensor, requests: list[Request]) -> list[Sampled]:
    return Sampler(logits.shape[1], _EOS, _CPU).start(logits, requests, None).wait()


def _token(logits: torch.Tensor, request: Request) -> int:
    return _sample(logits[None].clone(), [request])[0].token_id


def _histogram(logits: torch.Tensor, n: int, **params: Any) -> dict[int, float]:
    requests = [_request(seed=seed, **params) for seed in range(n)]
    tokens = _sample(logits.repeat(n, 1), requests)
    return {t: c / n for t, c in Counter(sampled.token_id for sampled in tokens).items()}


def test_temperature_zero_takes_the_most_likely_token() -> None:
    assert _token(torch.tensor([0.0, 3.0, 1.0]), _request(temperature=0.0)) == 1


@pytest.mark.parametrize("n_vocab", [12, 1000])
@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.7}, [oracle.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [oracle.TopKLogitsWarper(5)]),
        ({"top_p": 0.6}, [oracle.TopPLogitsWarper(0.6)]),
        ({"min_p": 0.3}, [oracle.MinPLogitsWarper(0.3)]),
        (
            {"temperature": 1.5, "top_k": 8, "top_p": 0.7, "min_p": 0.05},
            [
                oracle.TemperatureLogitsWarper(1.5),
                oracle.TopKLogitsWarper(8),
                oracle.TopPLogitsWarper(0.7),
                oracle.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_drawn_tokens_follow_the_filtered_distribution(
    params: dict[str, Any], warpers: list[Any], n_vocab: int
) -> None:
    torch.manual_seed(3)
    logits = 2.0 * torch.randn(n_vocab)
    expected = logits[None]
    for warper in warpers:
        expected = warper(None, expected)
    probs = torch.softmax(expected[0], -1)
    n = 4000
    found = _histogram(logits, n, **params)
    assert all(probs[token] > 0 for token in found)
    for token in torch.topk(probs, 5).indices.tolist():
        p = float(probs[token])
        assert abs(found.get(token, 0.0) - p) < 4.5 * (p * (1 - p) / n) ** 0.5 + 1e-3


def test_a_nucleus_wider_than_the_candidates_is_sorted_whole() -> None:
    found = _histogram(torch.zeros(2000), 3000, top_p=0.9)
    assert len(found) > 1000
    assert max(found) < 1800  # the last tenth of equal tokens never comes up


def test_a_nucleus_is_of_all_that_top_k_leaves_though_min_p_leaves_few() -> None:
    torch.manual_seed(5)
    spread = 1 + 1e-3 * torch.rand(1000)  # no two are equal
    weights = spread * torch.tensor([1.01] + 199 * [0.5] + 800 * [0.09])
    logits = weights.log()
    expected = logits[None]
    for warper in (
        oracle.TopKLogitsWarper(900),
        oracle.TopPLogitsWarper(0.9),
        oracle.MinPLogitsWarper(0.1),
    ):
        expected = warper(None, expected)
    kept = set(torch.isfinite(expected[0]).nonzero().flatten().tolist())
    assert len(kept) == 200
    assert set(_histogram(logits, 4000, top_k=900, top_p=0.9, min_p=0.1)) == kept


@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
def test_an_unfiltered_draw_inverts_the_distribution_of_the_whole_vocabulary(spread: float) -> None:
    """Both where the draw falls among the candidates and where it falls beyond them."""
    torch.manual_seed(4)
    logits = spread * torch.randn(2000)
    ordered, order = torch.sort(torch.softmax(logits, -1), descending=True, stable=True)
    cumulative = torch.cumsum(ordered.double(), 0)
    beyond = 0
    for seed in range(300):
        request = _request(seed=seed)
        index = int(
            torch.searchsorted(cumulative, uniform_of(request) * cumulative[-1], right=True)
        )
        beyond += index >= 256
        assert _token(logits, request) == int(order[index])
    assert 0 < beyond < 300


def test_the_same_seed_gives_the_same_token_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(1)
    logits = torch.randn(7, 500)
    requests = [_request(seed=seed, temperature=1.3, top_p=0.9) for seed in range(7)]
    together = [s.token_id for s in _sample(logits.clone(), requests)]
    alone = [_token(row, request) for row, request in zip(logits, requests, strict=True)]
    assert together == alone


def test_another_position_or_seed_draws_anew() -> None:
    logits = torch.zeros(1000)
    tokens = {_token(logits, _request(seed=s, output=[1] * n)) for s in (1, 2) for n in range(4)}
    assert len(tokens) == 8


def test_repetition_penalty_counts_prompt_and_output() -> None:
    torch.manual_seed(2)
    logits = torch.randn(20)
    request = _request(prompt=[3, 4], output=[7], repetition_penalty=1.8, temperature=0.0)
    seen = torch.tensor([[3, 4, 7]])
    expected = oracle.RepetitionPenaltyLogitsProcessor(1.8)(seen, logits[None].clone())
    assert _token(logits, request) == int(expected.argmax())
    boosted = logits.clone()
    boosted[7] = boosted.max() + 0.1
    assert _token(boosted, request) != 7


def test_presence_and_frequency_penalties_count_output_only() -> None:
    logits = torch.tensor([0.0, 1.0, 0.9, 0.0])
    assert _token(logits, _request(prompt=[1, 1], temperature=0.0, presence_penalty=2.0)) == 1
    penal = {"prompt": [3], "temperature": 0.0}
    assert _token(logits, _request(output=[1], presence_penalty=0.5, **penal)) == 2
    assert _token(logits, _request(output=[1], frequency_penalty=0.05, **penal)) == 1
    assert _token(logits, _request(output=[1] * 3, frequency_penalty=0.05, **penal)) == 2


def test_logit_bias_moves_the_choice() -> None:
    request = _request(temperature=0.0, logit_bias={0: 100.0})
    assert _token(torch.tensor([0.0, 5.0]), request) == 0


@pytest.mark.parametrize("output", [[], [3], [4, 3], [3, 4], [9, 3, 4]])
def test_bad_words_lose_their_last_token_after_the_others(output: list[int]) -> None:
    words = ((3,), (3, 4), (3, 4, 5), (9, 3, 4, 6))
    torch.manual_seed(2)
    logits = torch.randn(12)
    request = _request(output=output, temperature=0.0, bad_words=words)
    processor = oracle.NoBadWordsLogitsProcessor([list(word) for word in words])
    expected = processor(torch.tensor([output], dtype=torch.long), logits[None].clone())
    adjusted = logits[None].clone()
    token = _sample(adjusted, [request])[0].token_id
    assert torch.equal(adjusted, expected)
    assert token == int(expected.argmax())


def test_only_allowed_tokens_keep_their_logits_and_one_always_stays() -> None:
    logits = torch.arange(12.0)
    assert _token(logits, _request(temperature=0.0, allowed_token_ids=frozenset({3, 7}))) == 7
    bad = _request(temperature=0.0, allowed_token_ids=frozenset({3, 7}), bad_words=((7,),))
    assert _token(logits, bad) == 3
    nothing_else = _request(temperature=0.0, allowed_token_ids=frozenset({2}), min_tokens=5)
    assert _token(logits, nothing_else) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "params",
    [
        {"bad_words": tuple((token,) for token in range(12))},
        {"bad_words": ((3,), (9, 7)), "allowed_token_ids": frozenset({3, 7})},
    ],
)
def test_a_row_whose_every_token_is_forbidden_fails_alone_and_names_the_field(
    params: dict[str, Any], temperature: float
) -> None:
    logits = torch.arange(12.0).repeat(3, 1)
    seed = {"temperature": temperature, "seed": 1}
    rows = [_request(**seed), _request(output=[9], **seed, **params), _request(**seed)]
    alone = _token(logits[0], rows[0])
    first, none, last = _sample(logits, rows)
    assert isinstance(none.error, NoTokenAllowed)
    assert none.error.param == "bad_words"
    assert (first.error, last.error) == (None, None)
    assert first.token_id == last.token_id == alone


def test_min_tokens_keeps_end_tokens_away() -> None:
    logits = torch.tensor([0.0, 1.0, 9.0, 8.0])
    params = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": frozenset({3})}
    assert _token(logits, _request(output=[1], **params)) == 1
    assert _token(logits, _request(output=[1, 1], **params)) == 2


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, -1.0]])
    request = _request(temperature=0.0, logit_bias={2: 100.0}, logprobs=2)
    (sampled,) = _sample(logits.clone(), [request])
    expected = torch.log_softmax(logits[0], -1)
    assert sampled.token_id == 2
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(float(expected[2]))
    assert [token for token, _ in sampled.logprobs.top] == [1, 2]
    assert sampled.logprobs.top[0][1] == pytest.approx(float(expected[1]))


def test_a_greedy_row_without_a_number_fails_alone() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 2.0], 3 * [-torch.inf]])
    greedy = {"temperature": 0.0}
    requests = [_request(**greedy), _request(**greedy, logprobs=1), _request(**greedy)]
    good, no_number, nothing = _sample(logits, requests)
    assert (good.token_id, good.error) == (2, None)
    assert str(no_number.error) == str(nothing.error) == str(no_token())


def test_logprobs_without_top_give_the_chosen_token_only() -> None:
    (entry,) = Sampler(4, _EOS, _CPU).prompt_logprobs_of(torch.zeros(1, 4), [3], 0)
    assert entry.top == ()
    assert entry.logprob == pytest.approx(-1.3862944)
