"""The sampler takes the tokens of the definition. Oracle: ``sample_tokens_reference``."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.cpu.token_mask import mask_bits
from loraplex_kernels.reference.sampling import sample_tokens_reference
from loraplex_server.engine.errors import AdapterUnservable, GrammarTooComplex, NoTokenAllowed
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.sampling import sampler as sampler_module
from loraplex_server.engine.sampling.sampler import Sampled, SampledRows, Sampler
from loraplex_server.engine.steps.step_mode import StepMode
from tests.support.adapters.routed_plans import lora_plan
from tests.support.bases.architectures import tiny_model
from tests.support.gpu.meta_device import meta_gpu
from tests.support.servers.engines import GREEDY, generate_all, running_engine

_EOS = frozenset({2})
_CPU = torch.device("cpu")


class _Constraint:
    """A grammar that stands still."""

    error = None

    def __init__(self, forced: int | None = None) -> None:
        self.forced = forced


def _request(vocab_size: int, dice: random.Random, **params: Any) -> Request:
    prompt = [dice.randrange(vocab_size) for _ in range(dice.choice([1, 5, 90]))]
    output = [dice.randrange(vocab_size) for _ in range(dice.choice([0, 1, 20]))]
    sampling = SamplingParams(**({"max_tokens": 100} | params))
    source = GenerationRequest("r", tuple(prompt), sampling)
    request = Request(source, print, [-1, -2, *prompt, *output], len(prompt) + 2, n_virtual=2)
    request.seed = dice.randrange(1 << 40)
    return request


def _params(vocab_size: int, dice: random.Random) -> dict[str, Any]:
    """Some of everything, each off in half of the rows."""
    few = [dice.randrange(vocab_size) for _ in range(6)]
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 1e-9, 0.3, 1.0, 2.5],
        "top_k": [1, 3, 40, 256, 257, 400, vocab_size, (1 << 32) + 1],
        "top_p": [0.0, 1e-9, 0.1, 0.5, 0.9, 0.999],
        "min_p": [1e-9, 0.05, 0.3, 1.0],
        "repetition_penalty": [1e-30, 0.5, 1.3],
        "presence_penalty": [-2.0, 0.7],
        "frequency_penalty": [-0.3, 1.1],
        "logit_bias": [{few[0]: 3.0, few[1]: -100.0}],
        "bad_words": [((few[2],), (few[3], few[4]))],
        "min_tokens": [50],
        "allowed_token_ids": [frozenset(few), frozenset({2})],
        "logprobs": [0, 3],
    }
    rare = {"logit_bias", "bad_words", "min_tokens", "allowed_token_ids", "logprobs"}
    return {
        name: dice.choice(values)
        for name, values in choices.items()
        if dice.random() < (0.15 if name in rare else 0.5)
    }


def _logits(n_rows: int, vocab_size: int, dice: random.Random) -> Tensor:
    """Flat, peaked, with the ties of bfloat16, of a few values, and with tokens at -inf."""
    generator = torch.Generator().manual_seed(dice.randrange(1 << 30))
    logits = torch.randn(n_rows, vocab_size, generator=generator)
    for row in range(n_rows):
        logits[row] *= dice.choice([0.01, 1.0, 4.0, 30.0])
        kind = dice.randrange(5)
        if kind == 0:
            logits[row] = logits[row].bfloat16().float()
        elif kind == 1:
            logits[row] = logits[row].round()
        elif kind == 2:
            logits[row] = dice.choice([0.0, -0.0, 7.0])
        elif kind == 3:
            logits[row][torch.rand(vocab_size, generator=generator) < 0.3] = -torch.inf
    return logits


def _mask(vocab_size: int, dice: random.Random) -> NDArray[np.int32]:
    few = np.zeros(-(-vocab_size // 32), dtype=np.int32)
    for _ in range(dice.choice([1, 4, 40])):
        token = dice.randrange(vocab_size)
        few[token // 32] |= np.int32(np.uint32(1 << token % 32).view(np.int32))
    return few


def _defined(
    logits: Tensor, requests: list[Request], masks: NDArray[np.int32] | None = None
) -> list[Sampled]:
    """Sample by the definition."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "sample_tokens", sample_tokens_reference)
        return Sampler(logits.shape[1], _EOS, _CPU).start(logits.clone(), requests, masks).wait()


def _assert_same(found: list[Sampled], wanted: list[Sampled]) -> None:
    assert [str(one.error) for one in found] == [str(one.error) for one in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        if mine.error is not None:
            continue
        assert mine.token_id == theirs.token_id
        assert (mine.logprobs is None) == (theirs.logprobs is None)
        if mine.logprobs is None or theirs.logprobs is None:
            continue
        assert mine.logprobs.token_id == theirs.logprobs.token_id
        assert mine.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-4)
        values = [value for _, value in theirs.logprobs.top]
        assert [value for _, value in mine.logprobs.top] == pytest.approx(values, abs=1e-4)


@pytest.mark.parametrize("vocab_size", [37, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_gets_the_token_of_the_definition(vocab_size: int, seed: int) -> None:
    dice = random.Random(seed)
    n_rows, n_random = 400, 0
    requests = [_request(vocab_size, dice, **_params(vocab_size, dice)) for _ in range(n_rows)]
    logits = _logits(n_rows, vocab_size, dice)
    masks = np.stack([_mask(vocab_size, dice) for _ in requests])
    for row, request in enumerate(requests):
        if dice.random() < 0.2:
            forced = dice.randrange(vocab_size) if dice.random() < 0.2 else None
            request.constraint = _Constraint(forced)  # type: ignore[assignment]
        n_random += not request.source.sampling.greedy
        if bool((logits[row] == -torch.inf).all()):
            logits[row, 0] = 0.0
    wanted = [
        _defined(row[None], [request], mask[None])[0]
        for row, request, mask in zip(logits, requests, masks, strict=True)
        if _has_token(row, request, mask)
    ]
    kept = [
        i
        for i, (row, request, mask) in enumerate(zip(logits, requests, masks, strict=True))
        if _has_token(row, request, mask)
    ]
    assert len(kept) > 0.9 * n_rows
    assert n_random > 100
    sampler = Sampler(vocab_size, _EOS, _CPU)
    chosen = [requests[i] for i in kept]
    _assert_same(sampler.start(logits[kept].clone(), chosen, masks[kept]).wait(), wanted)


def _has_token(row: Tensor, request: Request, mask: NDArray[np.int32]) -> bool:
    """Whether any token is left whose logit is not -inf; other rows have tests of their own."""
    allowed = torch.ones(len(row), dtype=torch.bool)
    if request.constraint is not None:
        allowed &= torch.from_numpy(mask_bits(mask, len(row)))
    ids = request.source.sampling.allowed_token_ids
    if ids is not None:
        listed = torch.zeros_like(allowed)
        listed[sorted(ids - {2} or ids)] = True
        allowed &= listed
    return bool((row[allowed] > -torch.inf).any())


def test_of_a_grammars_forbidden_tokens_the_first_comes() -> None:
    """min_tokens forbids the end, which is all that the grammar allows."""
    dice = random.Random(1)
    mask = np.zeros((1, 2), dtype=np.int32)
    mask[0, 0] = 1 << 2
    for params in ({"min_tokens": 99}, {"allowed_token_ids": frozenset({9})}):
        for temperature in (0.0, 1.0):
            request = _request(40, dice, temperature=temperature, **params)
            request.constraint = _Constraint()  # type: ignore[assignment]
            logits = torch.randn(1, 40)
            (wanted,) = _defined(logits, [request], mask)
            (found,) = Sampler(40, _EOS, _CPU).start(logits, [request], mask).wait()
            assert found.token_id == wanted.token_id == 2


def test_a_row_without_a_token_fails_and_names_the_cause() -> None:
    dice = random.Random(2)
    sampler = Sampler(40, _EOS, _CPU)
    for value in (torch.inf, torch.nan, -torch.inf):
        logits = torch.zeros(2, 40)
        logits[1] = value
        requests = [_request(40, dice) for _ in range(2)]
        good, bad = sampler.start(logits, requests, None).wait()
        assert good.error is None
        assert isinstance(bad.error, AdapterUnservable)
        assert "no token has a probability" in str(bad.error)
    request = _request(40, dice)
    request.constraint = _Constraint()  # type: ignore[assignment]
    (found,) = sampler.start(torch.zeros(1, 40), [request], np.zeros((1, 2), dtype=np.int32)).wait()
    assert isinstance(found.error, GrammarTooComplex)


@pytest.mark.parametrize(
    "params",
    [
        {"bad_words": tuple((token,) for token in range(12))},
        {"bad_words": ((3,), (7,)), "allowed_token_ids": frozenset({3, 7})},
        {"bad_words": ((3,), (7,)), "grammar": 1 << 3 | 1 << 7},
        {"bad_words": ((3,),), "forced": 3},
    ],
    ids=["all", "all listed", "all of a grammar", "a forced one"],
)
def test_bad_words_that_leave_no_token_fail_their_row_alone(params: dict[str, Any]) -> None:
    dice = random.Random(5)
    grammar, forced = params.pop("grammar", None), params.pop("forced", None)
    requests = [_request(12, dice), _request(12, dice, **params), _request(12, dice)]
    if grammar is not None or forced is not None:
        requests[1].constraint = _Constraint(forced)  # type: ignore[assignment]
    masks = np.full((3, 1), -1 if grammar is None else grammar, dtype=np.int32)
    logits = torch.randn(3, 12)
    wanted = _defined(logits, requests, masks)
    found = Sampler(12, _EOS, _CPU).start(logits, requests, masks).wait()
    assert isinstance(found[1].error, NoTokenAllowed)
    assert [str(one.error) for one in found] == [str(one.error) for one in wanted]
    assert [found[i].token_id for i in (0, 2)] == [wanted[i].token_id for i in (0, 2)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammars_row_without_a_number_fails_alone(temperature: float) -> None:
    dice = random.Random(6)
    requests = [_request(40, dice, temperature=temperature) for _ in range(2)]
    for request in requests:
        request.constraint = _Constraint()  # type: ignore[assignment]
    masks = np.full((2, 2), 0xFF, dtype=np.int32)
    logits = torch.zeros(2, 40)
    logits[1, 5] = torch.nan
    wanted = _defined(logits, requests, masks)
    assert isinstance(wanted[1].error, AdapterUnservable)
    _assert_same(Sampler(40, _EOS, _CPU).start(logits, requests, masks).wait(), wanted)


def test_counts_grow_with_the_request() -> None:
    """The same as from the beginning, whenever the request was looked at before."""
    dice = random.Random(3)
    request = _request(30, dice, temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2)
    sampler = Sampler(30, _EOS, _CPU)
    for _ in range(80):
        logits = torch.randn(1, 30)
        (wanted,) = _defined(logits, [request])
        (found,) = sampler.start(logits, [request], None).wait()
        assert found.token_id == wanted.token_id
        request.token_ids.append(dice.randrange(30))


def test_a_step_copies_its_parameters_in_and_ids_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data, which refuse to be read and have no shapes that follow data."""
    dice = random.Random(4)
    requests = [_request(500, dice, **_params(500, dice)) for _ in range(30)]
    counts = [r.source.sampling.logprobs for r in requests]
    asking = [count for count in counts if count is not None]
    meta = torch.device("meta")
    sampler = Sampler(500, _EOS, meta)
    with meta_gpu(monkeypatch) as gpu:
        sampler.start(torch.empty(30, 500, device=meta), requests, None).wait()
        work = gpu.take()
        sampler.prompt_logprobs_of(torch.empty(3, 500, device=meta), [1, 2, 3], 2)
        of_prompt = gpu.take()
    assert work.launches == ["edit_kernel", "sort_kernel", "draw_kernel"]
    assert [(copy.is_pinned, copy.waits) for copy in work.copies_in] == [(True, False)]
    (out,) = work.copies_out
    assert out.shape == (30 + len(asking) * (1 + 2 * max(asking)),)
    assert (out.is_pinned, out.waits, len(work.waits)) == (True, False, 1)
    assert [copy.shape for copy in of_prompt.copies_out] == [(3 * (2 + 2 * 2),)]
    assert work.findings + of_prompt.findings == []


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        replace(GREEDY, temperature=1.1, seed=3, top_p=0.9, frequency_penalty=0.4),
        replace(GREEDY, temperature=0.8, seed=5, top_k=20, logprobs=2, prompt_logprobs=1),
    ],
    ids=["greedy", "penalised", "logprobs"],
)
def test_an_engine_that_samples_by_the_definition_answers_as_any(
    sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, start = [], Sampler.start

    def counted(self: Sampler, logits: Tensor, *rest: Any) -> SampledRows:
        rows.append(len(logits))
        return start(self, logits, *rest)

    monkeypatch.setattr(Sampler, "start", counted)
    model = tiny_model("llama")
    prompts = [[3, 17, 40], [70, 1], [100, 5, 6, 7, 8], [9]]
    plans = [lora_plan(model, rank=4, seed=1), None, lora_plan(model, rank=9, seed=2), None]
    with monkeypatch.context() as patch:
        patch.setattr(sampler_module, "sample_tokens", sample_tokens_reference)
        with running_engine(model, mode=StepMode(overlaps=True)) as engine:
            found = generate_all(engine, prompts, sampling, plans)
    assert max(rows) == 4
    with running_engine(model) as engine:
        wanted = generate_all(engine, prompts, sampling, plans)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids
        for ours, cpus in zip(mine.events, theirs.events, strict=True):
            for entry, expected in zip(
                (*ours.logprobs, *ours.prompt_logprobs),
                (*cpus.logprobs, *cpus.prompt_logprobs),
                strict=True,
            ):
                assert (entry is None) == (expected is None)
                if entry is not None and expected is not None:
                    assert (entry.token_id, entry.rank) == (expected.token_id, expected.rank)
                    assert entry.logprob == pytest.approx(expected.logprob, abs=1e-5)
                    assert [t for t, _ in entry.top] == [t for t, _ in expected.top]
