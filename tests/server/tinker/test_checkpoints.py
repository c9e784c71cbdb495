"""Checkpoints and sampling clients of the package tinker."""

import pickle

import httpx
import pytest
import tinker
from tinker import types

from tests.server.tinker.conftest import connected, datum, logprobs_of, new_client, step
from tests.support.servers.server_process import ServerProcess

_DATA = [datum([5, 6, 7, 8, 9, 10])]
_PROMPT = types.ModelInput.from_ints([5, 6, 7])


def _learn(client: tinker.TrainingClient, n_steps: int = 2) -> None:
    for _ in range(n_steps):
        client.forward_backward(_DATA, "cross_entropy")
        step(client, 5e-3)


def test_a_client_from_a_state_learns_on_to_the_same_bits(
    service: tinker.ServiceClient, server: ServerProcess
) -> None:
    client = new_client(service)
    _learn(client)
    path = client.save_state("half").result().path
    _learn(client)
    expected = logprobs_of(client, _DATA)
    with connected(server) as later:  # a session of its own
        resumed = later.create_training_client_from_state_with_optimizer(path).result()
        assert resumed.get_info().lora_rank == 4
        _learn(resumed)
        assert logprobs_of(resumed, _DATA) == expected
        weights_only = later.create_training_client_from_state(path).result()
        _learn(weights_only)
        assert logprobs_of(weights_only, _DATA) != expected  # Adam began anew
    with pytest.warns(FutureWarning):
        client.load_state_with_optimizer(path).result()
    _learn(client)
    assert logprobs_of(client, _DATA) == expected


def test_states_are_listed_kept_from_overwriting_and_deleted(
    service: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    client = new_client(service)
    _learn(client, 1)
    path = client.save_state("a", user_metadata={"note": "first"}).result().path
    sampler = client.save_weights_for_sampler("b", ttl_seconds=3600).result().path
    with pytest.raises(tinker.RequestFailedError, match="exists; take another name"):
        client.save_state("a").result()
    client.save_state("a", overwrite=True).result()
    listed = rest.list_checkpoints(client.model_id).result().checkpoints
    assert {each.tinker_path: each.checkpoint_type for each in listed} == {
        path: "training",
        sampler: "sampler",
    }
    assert [each.expires_at is None for each in listed if each.tinker_path == sampler] == [False]
    rest.set_checkpoint_ttl_from_tinker_path(sampler, None).result()
    run = rest.get_training_run(client.model_id).result()
    assert run.last_sampler_checkpoint is not None
    assert run.last_sampler_checkpoint.expires_at is None
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank, info.train_unembed) == ("tiny", 4, False)
    for each in (path, sampler):
        rest.delete_checkpoint_from_tinker_path(each).result()
    assert rest.list_checkpoints(client.model_id).result().checkpoints == []
    with pytest.raises(tinker.NotFoundError, match="there is no checkpoint"):
        service.create_training_client_from_state(path).result()


def test_weights_for_a_sampler_are_an_adapter_of_the_store(
    service: tinker.ServiceClient, server: ServerProcess
) -> None:
    client = new_client(service)
    untrained = service.create_sampling_client(
        client.save_weights_for_sampler("zero").result().path
    ).result()
    base = service.create_sampling_client(base_model="tiny").result()
    assert _greedy(untrained) == _greedy(base)
    _learn(client, 4)
    path = client.save_weights_for_sampler("learnt").result().path
    sampler = service.create_sampling_client(path).result()
    assert _greedy(sampler) != _greedy(base)
    name = f"tinker/{client.model_id.replace(':train:', '-')}/learnt"
    body = {"adapter": name, "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
    answer = httpx.post(
        f"{server.url}/v1/completions", json=body | {"return_token_ids": True, "ignore_eos": True}
    ).json()
    assert answer["choices"][0]["token_ids"] == _greedy(sampler)


def test_a_sampling_client_keeps_its_weights_and_an_inflight_one_takes_the_newest(
    service: tinker.ServiceClient,
) -> None:
    client = new_client(service)
    _learn(client)
    kept = client.save_weights_and_get_sampling_client().result()
    moving = client.save_weights_and_get_sampling_client(kind="inflight").result()
    before = kept.compute_logprobs(_PROMPT).result()
    assert moving.compute_logprobs(_PROMPT).result() == before
    _learn(client)
    newest = client.save_weights_and_get_sampling_client().result()
    after = newest.compute_logprobs(_PROMPT).result()
    assert after != before
    assert kept.compute_logprobs(_PROMPT).result() == before
    assert moving.compute_logprobs(_PROMPT).result() == after


def test_what_a_sample_holds(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="tiny").result()
    params = types.SamplingParams(max_tokens=5, temperature=0, stop=[])
    answer = sampler.sample(
        _PROMPT, 2, params, True, topk_prompt_logprobs=2, topk_sample_logprobs=3
    ).result()
    first, second = answer.sequences
    assert first.tokens == second.tokens
    assert first.stop_reason == "length"
    assert first.sequence_id != second.sequence_id
    assert first.topk_logprobs is not None
    assert first.logprobs is not None
    for token, logprob, top in zip(first.tokens, first.logprobs, first.topk_logprobs, strict=True):
        assert top is not None
        assert top[0] == (token, pytest.approx(logprob))
    assert answer.prompt_logprobs is not None
    assert answer.topk_prompt_logprobs is not None
    assert [row is None for row in answer.topk_prompt_logprobs] == [True, False, False]
    last = sampler.sample(_PROMPT, 1, params, True, prompt_logprobs_last_n=1).result()
    assert last.prompt_logprobs == [None, None, pytest.approx(answer.prompt_logprobs[2])]
    stop = first.tokens[1]
    stopped = sampler.sample(_PROMPT, 1, params.model_copy(update={"stop": [stop]})).result()
    assert stopped.sequences[0].tokens[-1] == stop
    assert stopped.sequences[0].stop_reason == "stop"
    seeded = types.SamplingParams(max_tokens=8, seed=7, stop=[])
    twice = [sampler.sample(_PROMPT, 4, seeded).result().sequences for _ in range(2)]
    assert [s.tokens for s in twice[0]] == [s.tokens for s in twice[1]]
    assert len({tuple(s.tokens) for s in twice[0]}) > 1
    with pytest.raises(tinker.BadRequestError, match="prompt_alt_tokens_k is not supported"):
        sampler.sample(_PROMPT, 1, params, prompt_alt_tokens_k=2).result()
    with pytest.raises(tinker.BadRequestError, match="maximum context length is 4096"):
        sampler.sample(_PROMPT, 1, types.SamplingParams(max_tokens=5000)).result()


def test_a_copy_of_a_sampling_client_samples(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="tiny").result()
    copy = pickle.loads(pickle.dumps(sampler))
    assert _greedy(copy) == _greedy(sampler)


def _greedy(sampler: tinker.SamplingClient) -> list[int]:
    params = types.SamplingParams(max_tokens=6, temperature=0, stop=[])
    return list(sampler.sample(_PROMPT, 1, params).result().sequences[0].tokens)
