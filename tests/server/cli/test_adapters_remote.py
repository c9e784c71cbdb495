"""`loraplex adapters` and its like against a server: found, reached, and given whole folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.cli.app import app
from loraplex_server.cluster.config import read_config
from loraplex_server.cluster.running_clusters import announced_cluster
from loraplex_server.settings import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.adapter_samples import SAMPLES
from tests.support.lora_files import write_lora
from tests.support.served_app import served_app
from tests.support.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_llama(), "tiny/llama")


@pytest.fixture
def front(tokenizer: PreTrainedTokenizerFast, spec: BaseSpec, tmp_path: Path) -> Iterator[Front]:
    """One that answers what takes any time at all with a job."""
    http = HttpConfig(served_model_names=("base",), job_wait_s=0.0)
    front = make_front(tokenizer, spec, tmp_path, http)
    yield front
    front.store.close()


@pytest.fixture
def url(front: Front) -> Iterator[str]:
    with served_app(front.app) as url:
        yield url


def run(*words: str | Path, fails: bool = False) -> Result:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert (result.exit_code != 0) is fails, result.output
    return result


def offered(line: str) -> list[str]:
    """What bash offers after Tab at the end of the line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    environment = {"_LORAPLEX_COMPLETE": "complete_bash", **words}
    return CliRunner().invoke(app, [], prog_name="loraplex", env=environment).stdout.split()


def test_a_running_cluster_is_found_as_a_server_is(
    front: Front, url: str, spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else commands would change a store on disk that nobody serves, and report success."""
    front.store.put_directory("mine", write_lora(front.root / "mine", spec))
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAPLEX_PORT", url.rpartition(":")[2])
    config = read_config(None)
    with announced_cluster(tmp_path / "home", config, "127.0.0.1:6379", None):
        output = run("adapters", "list").output
        assert f"using the server at {url}" in output
        assert "mine" in output
        assert offered("loraplex adapters show mi") == ["mine"]
        where = ["--model", "smollm2-135m-instruct", "--state-dir", str(config.server.store.root)]
        assert f"using the server at {url}" in run("adapters", "list", *where).output
    assert offered("loraplex adapters show mi") == []


def test_a_cluster_on_all_interfaces_is_reached_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HOME": str(tmp_path), "HOST": "0.0.0.0", "INSECURE": "true"}.items():
        monkeypatch.setenv(f"LORAPLEX_{name}", value)
    with announced_cluster(tmp_path, read_config(None), "127.0.0.1:6379", None) as url:
        assert url == "http://127.0.0.1:8000"


def test_a_source_that_the_server_takes_long_to_load_is_waited_for(
    front: Front, url: str, spec: BaseSpec
) -> None:
    write_lora(front.root / "first", spec)
    assert "x (revision 1)" in run("adapters", "add", "x", "first", "--url", url).output
    write_lora(front.root / "first", spec, seed=1)
    assert "x (revision 2)" in run("adapters", "add", "x", "first", "--url", url).output


def test_a_folder_that_is_not_there_is_named_as_such(url: str) -> None:
    output = run("adapters", "add", "x", "frist", "--url", url, fails=True).output
    assert "error: there is no folder 'frist' on this machine" in output
    address = run("adapters", "add", "x", "hf://org/repo", "--url", url, fails=True).output
    assert "--allow-source" in address
    assert "folder" not in address


def test_a_fine_tuned_model_is_uploaded_whole(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    model = tiny_llama()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data += 0.01
    model.save_pretrained(folder)
    card = json.loads(run("adapters", "add", "x", folder, "--json", "--url", url).stdout)
    assert card["family"] == "full-delta"
    assert list(card["report"]["modules"]) == ["model.layers.1.mlp.up_proj"]


def test_a_mixlora_config_is_uploaded(url: str, tmp_path: Path) -> None:
    sample = SAMPLES["MIXLORA"](tiny_llama(), tmp_path, True)
    save_file(
        {name: tensor.contiguous() for name, tensor in sample.tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "mixlora_config.json").write_text(json.dumps(sample.config))
    assert "family       mixlora" in run("adapters", "add", "x", tmp_path, "--url", url).output


def test_a_pickle_is_told_how_to_be_converted(url: str, spec: BaseSpec, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "old", spec)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    output = run("adapters", "add", "x", folder, "--url", url, fails=True).output
    assert "run `loraplex adapters convert`" in output


def test_what_lies_beside_the_weights_is_uploaded(url: str, spec: BaseSpec, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "own", spec, chat_template="{{ messages[0].content }}!")
    told = {"description": "Says AB.", "examples": ["hi"], "defaults": {"stop": ["END"]}}
    (folder / "card.json").write_text(json.dumps(told))
    card = json.loads(run("adapters", "add", "x", folder, "--json", "--url", url).stdout)
    assert {key: card[key] for key in told} == told
    plain = write_lora(tmp_path / "plain", spec)
    other = json.loads(run("adapters", "add", "y", plain, "--json", "--url", url).stdout)
    assert card["digest"] != other["digest"]  # the template is a part of it


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    front: Front, url: str, spec: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.store.put_directory("mine", write_lora(front.root / "mine", spec))
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAPLEX_URL", url)
    assert "mine" in run("adapters", "list").output
    assert offered("loraplex adapters show mi") == ["mine"]
    assert "no rows were routed" in run("adapters", "routing", "mine").output
    refused = run("generate", "Answer in French.", "--server", url, fails=True).output
    assert "error: " in refused
    assert "is `loraplex serve` running there?" not in refused
