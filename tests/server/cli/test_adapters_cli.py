"""`loraplex adapters` with a running server, without a server, and on adapter files."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from loraplex_server.cli.adapter_files import spark
from loraplex_server.cli.adapters import _listing
from loraplex_server.cli.app import app
from loraplex_server.model.loading.pull import loraplex_home
from loraplex_server.running_servers import running_servers
from tests.support.servers.server_process import save_tiny_model, server_process

WEIGHTS = "adapter_model.safetensors"


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


def test_the_shell_offers_commands() -> None:
    assert offered("loraplex adapters sh", "http://127.0.0.1:1") == ["show"]


@pytest.mark.slow
def test_a_running_server_is_announced_and_asked(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    folders = tmp_path / "folders"
    shutil.copytree(adapter, folders / "good")
    bad = shutil.copytree(adapter, folders / "bad")
    config = json.loads((bad / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "Qwen/Qwen2.5-0.5B-Instruct"
    (bad / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(4, 9)}, bad / WEIGHTS)
    with server_process(model, tmp_path / "state", "--adapters-dir", folders) as server:
        body = {"adapter": "bad", "messages": [{"role": "user", "content": "hi"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 404
        assert "its folder is refused: config names the base" in answer.json()["error"]["message"]
        listed = " ".join(run("list", "--url", server.url).output.split())
        both = f"names the base 'Qwen/Qwen2.5-0.5B-Instruct', this server runs {model.name!r}"
        assert f"refused: bad: config {both}, and the adapter does not fit" in listed
        missing = run("show", "GOOD", "--url", server.url, fails=True).output
        assert "closest registered: good" in missing
        assert "ranks 4" in run("inspect", "good", "--url", server.url).output
        assert "Its folder stays" in run("rm", "good", "--url", server.url).output
        assert server.url in [each.url for each in running_servers(loraplex_home())]
        run("add", "mine", adapter, "--url", server.url)
        assert "mine is on disk" in run("unload", "mine", "--url", server.url).output
        for line in ("loraplex adapters show mi", "loraplex chat --adapter m"):
            assert offered(line, server.url) == ["mine"]
        assert offered("loraplex adapters show other", server.url) == []
    assert server.url not in [each.url for each in running_servers(loraplex_home())]
    assert offered("loraplex adapters show mi", server.url) == []


def test_inspect_shows_spectra_and_intruders(model: Path, adapter: Path) -> None:
    where = ["--model", model]
    found = json.loads(run("inspect", adapter, "--intruders", "--json", *where).stdout)
    first = found["modules"][0]
    assert len(first["singular_values"]) == 4
    assert 1 <= first["effective_rank"] <= 4
    assert first["n_intruders"] >= 0
    assert "intruder dimensions:" in run("inspect", adapter, "--intruders", *where).output


def test_convert_makes_a_pickle_loadable(model: Path, adapter: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(
        {n: torch.nn.Parameter(t) for n, t in weights.items()}, adapter / "adapter_model.bin"
    )
    assert "adapters convert" in run("inspect", adapter, "--model", model, fails=True).output
    output = run("convert", adapter, tmp_path / "out").output
    assert "locked-down process" in output
    assert "lora, " in run("inspect", tmp_path / "out", "--model", model).output


def test_a_spectrum_is_a_line_of_blocks() -> None:
    assert spark((4.0, 2.0, 1.0, 0.0)) == "█▅▃▁"
    assert spark(()) == ""


def test_without_a_server_a_command_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path))
    assert "no server runs on this machine" in run("list", fails=True).output


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
