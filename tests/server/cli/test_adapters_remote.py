"""`loraplex adapters` finds a server, and uploads whole folders to it."""

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
from loraplex_server.cluster.ray.running_clusters import announced_cluster
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front
from tests.support.adapters.adapter_samples import SAMPLES
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.tiny_models import tiny_llama
from tests.support.servers.served_app import served_app


@pytest.fixture(scope="module")
def spec() -> BaseSpec:
    return BaseSpec.of(tiny_llama(), "tiny/llama")


@pytest.fixture
def front(tokenizer: PreTrainedTokenizerFast, spec: BaseSpec, tmp_path: Path) -> Iterator[Front]:
    """A server that answers every load with a job."""
    http = HttpConfig(served_model_names=("base",), job_wait_s=0.0)
    front = make_front(tokenizer, spec, tmp_path, http, n_kept_revisions=3)
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


def test_an_adapter_is_added_shown_rolled_back_and_removed(
    url: str, spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "adapter", spec)
    where = ["--url", url]
    added = run("adapters", "add", "team/de", adapter, "--description", "German", *where).output
    assert "alpha/r" in added
    assert "team/de" in run("adapters", "list", *where).output
    card = json.loads(run("adapters", "show", "team/de", "--json", *where).stdout)
    assert card["description"] == "German"
    again = run("adapters", "add", "team/de", adapter, "--no-replace", *where, fails=True).output
    assert "error:" in again
    go_back_and_forth(write_lora(tmp_path / "other", spec, seed=1), card["digest"], where)
    assert "removed team/de" in run("adapters", "rm", "team/de", *where).output
    assert json.loads(run("adapters", "list", "--json", *where).stdout) == []
    assert "does not exist" in run("adapters", "show", "team/de", *where, fails=True).output
    assert "does not exist" in run("adapters", "unload", "other", *where, fails=True).output


def go_back_and_forth(second_adapter: Path, first: str, where: list[str]) -> None:
    run("adapters", "add", "team/de", second_adapter, *where)
    current, older = run("adapters", "revisions", "team/de", *where).output.splitlines()[-2:]
    assert current.endswith("current")
    assert older.split()[:2] == ["1", first[:12]]
    back = run("adapters", "rollback", "team/de", *where).output
    assert f"team/de is {first[:12]} again (revision 3)" in back
    second = current.split()[1]
    assert second in run("adapters", "rollback", "team/de", "--digest", second, *where).output
    wrong = run("adapters", "rollback", "team/de", "--digest", "0000", *where, fails=True).output
    assert f"kept: {first[:12]}" in wrong


def test_a_refused_adapter_says_why_in_lines_not_in_a_traceback(
    url: str, spec: BaseSpec, tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "adapter", spec)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "lm_head"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    output = run("adapters", "add", "x", adapter, "--url", url, fails=True).output
    assert "lm_head: targeted by the config, has no tensors" in output
    output = run("adapters", "add", "train", adapter, "--url", url, fails=True).output
    taken = " ".join(output.split())
    assert "'train' is not an adapter name" in taken
    assert "choose another name" in taken
    assert "Traceback" not in output


def test_a_running_cluster_is_found_as_a_server_is(
    front: Front, url: str, spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front.store.put_directory("mine", write_lora(front.root / "mine", spec))
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAPLEX_PORT", url.rpartition(":")[2])
    config = read_config(None)
    with announced_cluster(tmp_path / "home", config, "127.0.0.1:6379", None):
        output = run("adapters", "list").output
        assert f"using the server at {url}" in output
        assert "mine" in output
        assert offered("loraplex adapters show mi") == ["mine"]
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
    refused = run("generate", "Answer in French.", "--server", url, fails=True).output
    assert "error: " in refused
    assert "run `loraplex serve`" not in refused
