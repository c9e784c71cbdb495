"""`loraplex adapters` as a user runs it: on a store on disk, and against a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from loraplex_server.cli.adapters import _listing, spark
from loraplex_server.cli.app import app
from tests.support.server_process import save_tiny_model, server_process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    out = config["num_attention_heads"] * config.get(
        "head_dim", hidden // config["num_attention_heads"]
    )
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, hidden)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(lora))
    return folder


def run(*words: str | Path, fails: bool = False) -> Result:
    result = CliRunner().invoke(app, ["adapters", *map(str, words)])
    assert (result.exit_code != 0) is fails, result.output
    return result


def life_of_an_adapter(adapter: Path, where: list[Any]) -> None:
    added = run("add", "team/de", adapter, "--description", "German", *where).output
    assert "alpha/r = 8/4 = 2" in added
    assert "team/de" in run("list", *where).output
    card = json.loads(run("show", "team/de", "--json", *where).stdout)
    assert card["ranks"] == [4]
    assert card["description"] == "German"
    again = run("add", "team/de", adapter, "--no-replace", *where, fails=True).output
    assert "error:" in again
    go_back_and_forth(adapter, card["digest"], where)
    assert "removed team/de" in run("rm", "team/de", *where).output
    assert json.loads(run("list", "--json", *where).stdout) == []
    assert "does not exist" in run("show", "team/de", *where, fails=True).output


def go_back_and_forth(adapter: Path, first: str, where: list[Any]) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    run("add", "team/de", adapter, *where)
    current, kept = run("revisions", "team/de", *where).output.splitlines()[-2:]
    assert current.endswith("current")
    assert kept.split()[:2] == ["1", first[:12]]
    back = run("rollback", "team/de", *where).output
    assert f"team/de is {first[:12]} again (revision 3)" in back
    second = current.split()[1]
    assert second in run("rollback", "team/de", "--digest", second, *where).output
    wrong = run("rollback", "team/de", "--digest", "0000", *where, fails=True).output
    assert f"kept: {first[:12]}" in wrong
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def offered(line: str, url: str) -> list[str]:
    """What bash offers after Tab at the end of the line."""
    environment = {
        "_LORAPLEX_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
        "LORAPLEX_URL": url,
    }
    result = CliRunner().invoke(app, [], prog_name="loraplex", env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def test_the_shell_offers_commands_and_scenarios() -> None:
    assert offered("loraplex adapters sh", "http://127.0.0.1:1") == ["show"]
    assert offered("loraplex bench work", "http://127.0.0.1:1") == ["working-set"]


def test_an_adapter_lives_in_a_store_on_disk(model: Path, adapter: Path, tmp_path: Path) -> None:
    life_of_an_adapter(adapter, ["--model", model, "--state-dir", tmp_path / "state"])


@pytest.mark.parametrize("command", ["rm x --state-dir", "list --model", "unload x --model"])
def test_a_url_beside_a_store_is_refused(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would be changed, and the store left as it is."""
    words = [*command.split(), "here"]
    assert "LORAPLEX_URL" in run(*words, "--url", "http://127.0.0.1:9", fails=True).output
    monkeypatch.setenv("LORAPLEX_URL", "http://127.0.0.1:9")
    assert "LORAPLEX_URL" in run(*words, fails=True).output


@pytest.mark.slow
def test_an_adapter_lives_in_a_running_server(model: Path, adapter: Path, tmp_path: Path) -> None:
    with server_process(model, tmp_path / "state") as server:
        life_of_an_adapter(adapter, ["--url", server.url])
        run("add", "mine", adapter, "--url", server.url)
        assert "mine is on disk" in run("unload", "mine", "--url", server.url).output
        assert "does not exist" in run("unload", "other", "--url", server.url, fails=True).output
        for line in ("loraplex adapters show mi", "loraplex chat --adapter m"):
            assert offered(line, server.url) == ["mine"]
        assert offered("loraplex adapters show other", server.url) == []
    assert offered("loraplex adapters show mi", server.url) == []  # it runs no more


@pytest.mark.slow
def test_the_running_server_is_found_without_its_address(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with server_process(model, state) as server:
        output = run("list", "--model", model, "--state-dir", state).output
        assert f"using the server at {server.url}" in output
        life_of_an_adapter(adapter, ["--model", model, "--state-dir", state])


def test_a_refused_adapter_says_why_in_lines_not_in_a_traceback(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "v_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    where = ["--model", model, "--state-dir", tmp_path / "state"]
    output = run("add", "x", adapter, *where, fails=True).output
    assert "v_proj: targeted by the config, has no tensors" in output
    taken = " ".join(run("add", "train", adapter, *where, fails=True).output.split())
    assert "'train' is not an adapter name" in taken
    assert "choose another name" in taken
    assert "Traceback" not in output


def test_inspect_shows_spectra_and_intruders(model: Path, adapter: Path, tmp_path: Path) -> None:
    where = ["--model", model, "--state-dir", tmp_path / "state"]
    found = json.loads(run("inspect", adapter, "--intruders", "--json", *where).stdout)
    first = found["modules"][0]
    assert len(first["singular_values"]) == 4
    assert 1 <= first["effective_rank"] <= 4
    assert first["n_intruders"] >= 0
    assert "intruder dimensions:" in run("inspect", adapter, "--intruders", *where).output
    picture = tmp_path / "spectra.png"
    pytest.importorskip("matplotlib")
    run("inspect", adapter, "--plot", picture, *where)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_convert_makes_a_pickle_loadable(model: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(
        {n: torch.nn.Parameter(t) for n, t in weights.items()}, adapter / "adapter_model.bin"
    )
    where = ["--model", model, "--state-dir", tmp_path / "state"]
    assert "adapters convert" in run("add", "x", adapter, *where, fails=True).output
    output = run("convert", adapter, tmp_path / "out").output
    assert "locked-down process" in output
    assert "family       lora" in run("add", "x", tmp_path / "out", *where).output


def test_a_spectrum_is_a_line_of_blocks() -> None:
    assert spark((4.0, 2.0, 1.0, 0.0)) == "█▅▃▁"
    assert spark(()) == ""


def test_nothing_is_unloaded_where_no_server_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path))
    assert "no server runs on this machine" in run("unload", "mine", fails=True).output


@pytest.mark.parametrize("width", [80, 120])
def test_the_lines_of_the_listing_fit_the_terminal_and_keep_names_whole(width: int) -> None:
    card = {
        "name": "generated/32023ca30d1ead2d",
        "family": "generated",
        "ranks": [2, 4, 8],
        "n_bytes": {"disk": 14 << 20},
        "tier": "device",
        "revision": 3,
        "digest": "03f8a3f4008d" + "0" * 52,
        "description": "Writes a date in German, as the value of one key of a JSON object. " * 3,
    }
    head, line = _listing([card], width)
    assert max(len(head), len(line)) <= width
    assert card["name"] in line
    assert "14.0 MiB" in line
    assert "Writes a d" in line
    assert ("03f8a3f4008d" in line) is (width == 120)
