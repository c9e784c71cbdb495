"""Training clients of the package tinker, against PEFT and torch on this machine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import httpx
import pytest
import tinker
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tinker import types
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.server.tinker.conftest import datum, logprobs_of, new_client, step
from tests.support.servers.server_process import ServerProcess

_TEXTS = [[5, 6, 7, 8, 9, 10], [20, 21, 22, 23], [30, 5, 31, 6, 32, 7, 33]]
_RATE = 1e-3


def test_a_supervised_loop_moves_the_adapter_as_peft_and_adamw_do(
    service: tinker.ServiceClient, tiny_base: Path, state_dir: Path
) -> None:
    client = new_client(service, seed=3)
    saved = client.save_state("start").result().path
    run, _, name = saved.removeprefix("tinker://").split("/")
    folder = state_dir / "checkpoints" / "of-" / run.replace(":train:", "-")
    start = load_file(folder / f"weights.{name}.safetensors")
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0),
    )
    parameters = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    assert len(parameters) == sum(n.startswith("now.") for n in start)
    for key, parameter in parameters.items():
        parameter.data.copy_(start["now." + key.replace(".default.", ".")])
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=_RATE, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0
    )
    weights = [[0.0] + [1.0] * (len(text) - 2) for text in _TEXTS]
    data = [datum(text, each) for text, each in zip(_TEXTS, weights, strict=True)]

    losses, expected = [], []
    for _ in range(6):
        future = client.forward_backward(data, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=_RATE)).result()
        losses.append(future.result().metrics["loss:sum"])
        loss = sum(
            -(_peft_logprobs(peft, text) * torch.tensor(each)).sum()
            for text, each in zip(_TEXTS, weights, strict=True)
        )
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        optimiser.zero_grad()
        expected.append(loss.item())

    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 1
    with torch.no_grad():
        learnt = [_peft_logprobs(peft, text).tolist() for text in _TEXTS]
    for ours, theirs in zip(logprobs_of(client, data), learnt, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)
    sampler = client.save_weights_and_get_sampling_client().result()
    for text, theirs in zip(_TEXTS, learnt, strict=True):
        served = sampler.compute_logprobs(types.ModelInput.from_ints(text)).result()
        assert served[0] is None
        assert served[1:] == pytest.approx(theirs, abs=2e-3)


def test_on_policy_importance_sampling_has_the_gradient_of_weighted_cross_entropy(
    service: tinker.ServiceClient,
) -> None:
    one, other = new_client(service), new_client(service)
    (old,) = logprobs_of(one, [datum(_TEXTS[0])])
    advantages = [0.0, 0.0, 1.0, -0.5, 2.0]
    weighted = datum(_TEXTS[0], logprobs=old, advantages=advantages)
    result = one.forward_backward([weighted], "importance_sampling").result()
    assert result.metrics["loss:sum"] == pytest.approx(-sum(advantages), abs=1e-4)
    other.forward_backward([datum(_TEXTS[0], advantages)], "cross_entropy").result()
    assert _after_step(one) == pytest.approx(_after_step(other), abs=1e-4)


def test_ppo_and_a_custom_loss_with_its_formula_move_the_adapter_equally(
    service: tinker.ServiceClient,
) -> None:
    one, other = new_client(service), new_client(service)
    (now,) = logprobs_of(one, [datum(_TEXTS[0])])
    shifts, advantages = [0.0, 0.4, -0.4, 0.05, -0.05], [1.0, 1.0, -1.0, 2.0, -0.5]
    old = [value - shift for value, shift in zip(now, shifts, strict=True)]

    def formula(data: list[types.Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        ratio, gain = (logprobs[0] - torch.tensor(old)).exp(), torch.tensor(advantages)
        clipped = ratio.clamp(0.9, 1.1)
        return -torch.minimum(ratio * gain, clipped * gain).sum(), {"ratio": ratio.mean().item()}

    data = [datum(_TEXTS[0], logprobs=old, advantages=advantages)]
    clips = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    ours = one.forward_backward(data, "ppo", clips).result()
    theirs = other.forward_backward_custom([datum(_TEXTS[0])], formula).result()
    assert ours.metrics["loss:sum"] == pytest.approx(theirs.metrics["loss:sum"], abs=1e-4)
    assert theirs.metrics["ratio"] == pytest.approx(1.03, abs=0.1)
    assert _after_step(one) == pytest.approx(_after_step(other), abs=1e-4)


def test_a_traced_custom_loss_runs(service: tinker.ServiceClient) -> None:
    def neg_ll(logprobs: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -(logprobs * weights).sum()
        return loss, {"custom/neg_ll:sum": loss}

    client = new_client(service)
    handle = service.create_custom_loss(neg_ll, {"logprobs": 1, "weights": 1}).result()
    data = [datum(text) for text in _TEXTS]
    result = client.forward_backward_custom(data, handle).result()
    expected = -sum(map(sum, logprobs_of(client, data)))
    assert result.metrics["custom/neg_ll:sum"] == pytest.approx(expected, rel=1e-5)


def test_calls_that_arrive_out_of_order_run_in_the_order_of_their_numbers(
    service: tinker.ServiceClient,
) -> None:
    """The package splits large data and sends the first part last."""
    client, other = new_client(service), new_client(service)
    many = [datum(_TEXTS[i % 3]) for i in range(1030)]  # more than fit into a call
    whole = client.forward_backward(many, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=_RATE))
    assert len(whole.result().loss_fn_outputs) == len(many)
    for part in (many[:500], many[500:]):
        other.forward_backward(part, "cross_entropy")
    step(other)
    assert _logprobs(client) == pytest.approx(_logprobs(other), abs=1e-4)


def test_clients_at_once_share_batches_and_learn_what_they_would_alone(
    service: tinker.ServiceClient, server: ServerProcess
) -> None:
    before = _n_shared(server)
    clients = [new_client(service, seed=5) for _ in range(4)]
    start = Barrier(len(clients))

    def learn(number: int) -> list[float]:
        start.wait()
        for _ in range(4):
            clients[number].forward_backward([datum(_TEXTS[number % 3])], "cross_entropy")
            step(clients[number])
        return _logprobs(clients[number])

    with ThreadPoolExecutor(len(clients)) as pool:
        together = list(pool.map(learn, range(len(clients))))
    assert _n_shared(server) > before
    start = Barrier(1)
    clients = [new_client(service, seed=5) for _ in range(2)]
    for number, client in enumerate(clients):
        assert learn(number) == pytest.approx(together[number], abs=1e-4)
        del client


def test_a_small_rl_loop_improves_a_toy_reward(service: tinker.ServiceClient) -> None:
    """As ``recipes/rl_loop.py`` of tinker-cookbook, with a group a prompt and centred rewards."""
    client = new_client(service)
    prompts = [types.ModelInput.from_ints(ids) for ids in ([40, 41], [50, 51, 52])]
    params = types.SamplingParams(max_tokens=4, temperature=1.0, stop=[])
    means = []
    for number in range(12):
        sampler = client.save_weights_and_get_sampling_client().result()
        seeded = params.model_copy(update={"seed": number})
        futures = [sampler.sample(prompt, 32, seeded) for prompt in prompts]
        data, rewards = [], []
        for prompt, future in zip(prompts, futures, strict=True):
            sequences = future.result().sequences
            group = [_reward(sequence.tokens) for sequence in sequences]
            rewards += group
            mean = sum(group) / len(group)
            for sequence, reward in zip(sequences, group, strict=True):
                assert sequence.logprobs is not None
                padding = [0.0] * (prompt.length - 1)
                whole = [*prompt.to_ints(), *sequence.tokens]
                advantages = [*padding, *[reward - mean] * len(sequence.tokens)]
                old = [*padding, *sequence.logprobs]
                data.append(datum(whole, logprobs=old, advantages=advantages))
        client.forward_backward(data, "importance_sampling")
        step(client, 5e-3)
        means.append(sum(rewards) / len(rewards))
    assert means[0] < 0.6
    assert means[-1] > 0.85


def test_errors_of_calls_name_what_is_wrong(service: tinker.ServiceClient) -> None:
    client = new_client(service)
    wrong = {
        "dro": ([datum(_TEXTS[0])], "known: cross_entropy, importance_sampling, ppo"),
        "ppo": ([datum(_TEXTS[0])], "takes advantages, logprobs, target_tokens, weights"),
        "cross_entropy": ([datum([5, 6, 999])], "ids outside of 0 to 299"),
        "importance_sampling": (
            [datum(_TEXTS[0], logprobs=[0.0] * 5, advantages=[float("nan")] * 5)],
            "not finite",
        ),
    }
    for loss, (data, reason) in wrong.items():
        with pytest.raises(tinker.RequestFailedError, match=reason) as raised:
            client.forward_backward(data, loss).result()  # type: ignore[arg-type]
        assert raised.value.category is types.RequestErrorCategory.User
    with pytest.raises(tinker.RequestFailedError, match="tokens, 1 to 65536 are accepted"):
        client.forward([datum([5] * 1000)] * 70, "cross_entropy").result()
    assert logprobs_of(client, [datum(_TEXTS[0])])  # calls after failed ones have their turn
    with pytest.raises(tinker.BadRequestError, match="is not served; this server has tiny"):
        service.create_lora_training_client("Qwen/Qwen3-8B").result()
    with pytest.raises(tinker.RequestFailedError, match=r"rank is 513, this server serves at most"):
        service.create_lora_training_client("tiny", rank=513).result()


def test_capabilities_and_information(
    service: tinker.ServiceClient, rest: tinker.RestClient
) -> None:
    (model,) = rest.get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length) == ("tiny", 4096)
    assert model.trainable
    info = new_client(service).get_info()
    assert (info.model_name, info.lora_rank, info.is_lora) == ("tiny", 4, True)


def _peft_logprobs(model: torch.nn.Module, text: list[int]) -> Tensor:
    logits = model(torch.tensor([text])).logits[0, :-1]
    targets = torch.tensor(text[1:])[:, None]
    return logits.log_softmax(-1).gather(1, targets).squeeze(1)


def _logprobs(client: tinker.TrainingClient) -> list[float]:
    return [value for row in logprobs_of(client, [datum(t) for t in _TEXTS]) for value in row]


def _after_step(client: tinker.TrainingClient) -> list[float]:
    step(client)
    return _logprobs(client)


def _reward(tokens: list[int]) -> float:
    return sum(token % 2 for token in tokens) / max(1, len(tokens))


def _n_shared(server: ServerProcess) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    name = 'loraplex_training_batches_total{shared="yes"}'
    (line,) = [each for each in lines if each.startswith(name)]
    return float(line.split()[-1])
