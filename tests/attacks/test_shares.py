"""One tenant takes as much of a shared resource as it can get, and another uses it meanwhile.

The longest wait of the other tenant is compared with the time of the whole flood, so that a slow
machine changes nothing. In one queue for all, that share is near 1.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraplex_adapter_store.base_spec import BaseSpec
from tests.attacks.test_neighbours import ENDLESS
from tests.attacks.two_tenants import Neighbours, Tenant, two_tenants, waited
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.bounds import broken_only_if_each_time, check_below
from tests.support.servers.server_process import save_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENDLESS_TEMPLATE = (
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
)
NUMBERS = itertools.count()  # a text that came before has its answer in a cache


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Neighbours]:
    folder = tmp_path_factory.mktemp("shared")
    model = save_tiny_model(folder / "model")
    write_lora(folder / "lora", BaseSpec.of(tiny_model(), "model"))
    with two_tenants(folder, model, "--allow-training") as both:
        yield both


@pytest.mark.nightly
@broken_only_if_each_time
def test_texts_of_one_tenant_for_the_encoder_go_between_those_of_another(
    neighbours: Neighbours, pulled_encoder: Path
) -> None:
    """A text waits for two pieces of 256 tokens at most, one when it becomes tokens.

    2,048 texts are some fifty pieces, which take 4 s of CPU.
    """
    texts = [f"text {next(NUMBERS)}" for _ in range(2048)]

    def embed(tenant: Tenant, *texts: str) -> None:
        body = {"model": "all-minilm-l6-v2", "input": list(texts)}
        assert len(tenant.post("/v1/embeddings", body)["data"]) == len(texts)

    flood = [lambda: embed(neighbours.flood, *texts)]
    check_below(waited(flood, lambda: embed(neighbours.small, "one text")), 0.15)


@pytest.mark.nightly
@broken_only_if_each_time
def test_choices_of_adapters_for_one_tenant_go_between_those_for_another(
    neighbours: Neighbours, pulled_encoder: Path
) -> None:
    for tenant in (neighbours.flood, neighbours.small):
        tenant.put("sql", neighbours.folder / "lora", description=b"Writes SQL")

    def route(tenant: Tenant, text: str) -> None:
        assert tenant.post("/v1/route", {"input": text})["candidates"]

    def many() -> None:
        for _ in range(5):
            route(neighbours.flood, f"question {next(NUMBERS)} " + "of several words " * 40)

    flood = [many] * 24
    check_below(waited(flood, lambda: route(neighbours.small, "count the orders")), 0.2)


@broken_only_if_each_time
def test_an_upload_does_not_wait_for_another_tenants(neighbours: Neighbours) -> None:
    """Each upload of the flood is a pattern that has to be stopped."""
    folder = neighbours.folder / "lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    hostile = json.dumps({**config, "target_modules": ENDLESS}).encode()
    flood = [lambda: neighbours.flood.put("x", folder, 400, config=hostile)] * 6
    check_below(waited(flood, lambda: neighbours.small.put("mine", folder)), 0.4)


@pytest.mark.nightly
@broken_only_if_each_time
def test_a_chat_of_one_tenant_does_not_wait_for_templates_of_another(
    neighbours: Neighbours,
) -> None:
    folder = neighbours.folder / "lora"
    for n in range(4):
        template = f"{ENDLESS_TEMPLATE}{next(NUMBERS)}".encode()
        neighbours.flood.put(f"endless-{n}", folder, chat_template=template)
    neighbours.small.put("polite", folder, chat_template=b"good {{ messages[0].content }}")

    def chat(tenant: Tenant, adapter: str, *statuses: int) -> None:
        body = {"adapter": adapter, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        tenant.post("/v1/chat/completions", body, *statuses)

    flood = [lambda n=n: chat(neighbours.flood, f"endless-{n}", 400, 503) for n in range(4)]
    check_below(waited(flood, lambda: chat(neighbours.small, "polite")), 0.5)


@broken_only_if_each_time
def test_a_grammar_of_one_tenant_does_not_wait_for_those_of_another(
    neighbours: Neighbours,
) -> None:
    def complete(tenant: Tenant, grammar: dict[str, Any], *statuses: int) -> None:
        body = {"prompt": "x", "max_tokens": 1, **grammar}
        tenant.post("/v1/completions", body, *statuses)

    def large() -> dict[str, Any]:
        values = [f"value {next(NUMBERS)}" for _ in range(12_000)]
        return {"guided_json": {"enum": values}}

    flood = [lambda: complete(neighbours.flood, large(), 200, 503)] * 12
    small = lambda: complete(neighbours.small, {"guided_regex": f"a{next(NUMBERS)}"})  # noqa: E731
    check_below(waited(flood, small), 0.5)


@broken_only_if_each_time
def test_a_short_text_does_not_wait_for_another_tenants_long_ones(
    neighbours: Neighbours,
) -> None:
    """The short text has no base that could be slow: only tokens are asked for."""

    def tokenize(tenant: Tenant, text: str) -> None:
        tenant.post("/tokenize", {"prompt": text})

    long = "word " * 4000
    flood = [lambda: [tokenize(neighbours.flood, long) for _ in range(4)]] * 24
    check_below(waited(flood, lambda: tokenize(neighbours.small, "x")), 0.25)


@broken_only_if_each_time
def test_lists_for_one_tenant_go_between_those_for_another(neighbours: Neighbours) -> None:
    neighbours.small.put("mine", neighbours.folder / "lora")

    def read(tenant: Tenant, path: str) -> None:
        tenant.http.get(path).raise_for_status()

    flood = [lambda: [read(neighbours.flood, "/v1/adapters") for _ in range(24)]] * 16
    check_below(waited(flood, lambda: read(neighbours.small, "/v1/adapters/mine")), 0.25)


@broken_only_if_each_time
def test_loads_of_one_tenant_go_beside_those_of_another(neighbours: Neighbours) -> None:
    """Each call reads its adapter from the disk."""
    base = BaseSpec.of(tiny_model(), "model")
    for n in range(16):
        folder = write_lora(neighbours.folder / f"cold-{n}", base, seed=n + 1)
        neighbours.flood.put(f"cold-{n}", folder)
    neighbours.small.put("cold", neighbours.folder / "lora")

    def load(tenant: Tenant, name: str) -> None:
        tenant.post(f"/v1/adapters/{name}/unload", {})
        tenant.post("/v1/completions", {"prompt": "x", "adapter": name, "max_tokens": 1})

    flood = [lambda n=n: [load(neighbours.flood, f"cold-{n}") for _ in range(6)] for n in range(16)]
    check_below(waited(flood, lambda: load(neighbours.small, "cold")), 0.4)


def test_a_fine_tuning_job_does_not_wait_for_those_of_another_tenant(
    neighbours: Neighbours,
) -> None:
    def order(tenant: Tenant, n_epochs: int) -> str:
        lines = (
            {"messages": [{"role": "user", "content": f"word {n}"},
                          {"role": "assistant", "content": "AB"}]}
            for n in range(24)
        )  # fmt: skip
        stored = tenant.http.post(
            "/v1/files",
            files={"file": "\n".join(map(json.dumps, lines)).encode()},
            data={"purpose": "fine-tune"},
        )
        body = {
            "model": "model",
            "training_file": stored.raise_for_status().json()["id"],
            "hyperparameters": {"n_epochs": n_epochs, "batch_size": 1},
        }
        return str(tenant.post("/v1/fine_tuning/jobs", body)["id"])

    def status(tenant: Tenant, job: str) -> str:
        answer = tenant.http.get(f"/v1/fine_tuning/jobs/{job}")
        return str(answer.raise_for_status().json()["status"])

    jobs = [order(neighbours.flood, 50) for _ in range(4)]
    mine = order(neighbours.small, 2)
    list(_states(neighbours.small, mine))  # until it ends
    assert status(neighbours.small, mine) == "succeeded"
    left = [status(neighbours.flood, job) for job in jobs]
    assert "succeeded" not in left
    for job in jobs:
        neighbours.flood.post(f"/v1/fine_tuning/jobs/{job}/cancel", {})


def _states(tenant: Tenant, job: str) -> Iterator[dict[str, Any]]:
    with tenant.http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


@pytest.fixture(scope="module")
def on_the_base(
    tmp_path_factory: pytest.TempPathFactory, pulled_base: Path, pulled_encoder: Path
) -> Iterator[Neighbours]:
    """The default base, for which adapters can be generated."""
    folder = tmp_path_factory.mktemp("base")
    flags = ["--adapter-memory", "256MiB", "--kv-memory", "64MiB"]
    with two_tenants(folder, pulled_base, *flags) as both:
        yield both


@pytest.mark.nightly
@broken_only_if_each_time
def test_full_fine_tunes_without_structure_hold_up_nobody(
    on_the_base: Neighbours, pulled_base: Path
) -> None:
    folder = on_the_base.folder / "full"
    folder.mkdir(exist_ok=True)
    weights = load_file(next(pulled_base.glob("*.safetensors")))
    random = torch.Generator().manual_seed(0)
    noisy = {
        name: value + 0.01 * torch.randn(value.shape, generator=random).to(value.dtype)
        for name, value in weights.items()
        if "layers." in name and value.dim() == 2
    }
    save_file(noisy, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "FULL"}')
    small = _real_lora(on_the_base.folder / "small", noisy)
    flood = [lambda n=n: on_the_base.flood.put(f"full-{n}", folder, 400) for n in range(4)]
    check_below(waited(flood, lambda: on_the_base.small.put("mine", small)), 0.5)


def _real_lora(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    n_out, n_in = weights[name].shape
    module = f"base_model.model.{name.removesuffix('.weight')}"
    random = torch.Generator().manual_seed(1)
    factors = {
        f"{module}.lora_A.weight": 0.01 * torch.randn(4, n_in, generator=random),
        f"{module}.lora_B.weight": 0.01 * torch.randn(n_out, 4, generator=random),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "layers_to_transform": [int(name.split("layers.")[1].split(".")[0])]})
    )
    return folder


@pytest.mark.nightly
@broken_only_if_each_time
def test_a_new_description_waits_for_one_of_another_tenant_at_most(
    on_the_base: Neighbours,
) -> None:
    def describe(tenant: Tenant) -> None:
        text = f"Give the number {next(NUMBERS)} in Spanish"
        body = {"description": text, "force": True, "probe": False}
        tenant.post("/v1/adapters/generate", body, 201)

    flood = [lambda: describe(on_the_base.flood)] * 24
    check_below(waited(flood, lambda: describe(on_the_base.small)), 0.25)


@pytest.mark.nightly
def test_learning_from_examples_waits_for_one_job_of_another_tenant_at_most(
    on_the_base: Neighbours,
) -> None:
    def order(tenant: Tenant, name: str) -> str:
        body = {
            "name": name,
            "description": "Give the last name, then the first",
            "examples": [{"prompt": f"Ann {n}", "answer": f"{n}, Ann"} for n in range(8)],
            "budget_s": 12,
        }
        return str(tenant.post("/v1/adapters/generate", body, 202)["id"])

    jobs = [order(on_the_base.flood, f"learnt-{n}") for n in range(4)]
    mine = order(on_the_base.small, "mine-learnt")
    assert list(_states(on_the_base.small, mine))[-1]["status"] != "running"
    left = [on_the_base.flood.http.get(f"/v1/jobs/{job}").json()["status"] for job in jobs]
    assert left.count("running") >= 2, left
