from pathlib import Path

import pytest
from typer.testing import CliRunner

from loraplex_server.cli.app import app

RUNNER = CliRunner()


def test_a_server_that_is_not_there_is_an_error_of_one_line() -> None:
    result = RUNNER.invoke(app, ["generate", "to French", "--server", "http://127.0.0.1:9"])
    assert result.exit_code == 1
    assert "run `loraplex serve`, or give its URL" in result.output


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--server", "http://127.0.0.1:9", "--out", "made"], "give --name instead of --out"),
        (["--server", "http://127.0.0.1:9", "--base", "other"], "leave out --base"),
        (["--name", "mine"], "add --server URL"),
        (["--method", "sg-lora"], "add --server URL"),
    ],
)
def test_options_of_the_other_place_are_refused_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = RUNNER.invoke(app, ["generate", "to French", *options])
    assert result.exit_code == 2, result.output
    assert remedy in " ".join(result.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "options", "problem"),
    [
        ("out", [], "is a file"),
        ("out/adapter_config.json", [], "give --overwrite to replace"),
        ("out/notes.txt", ["--overwrite"], "choose a new folder"),
    ],
)
def test_what_is_at_out_is_kept(
    tmp_path: Path, file: str, options: list[str], problem: str
) -> None:
    out, kept = tmp_path / "out", tmp_path / file
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    result = RUNNER.invoke(app, ["generate", "to French", "--out", str(out), *options])
    assert result.exit_code == 2, result.output
    assert problem in " ".join(result.output.replace("│", " ").split())
    assert kept.read_text() == "mine"


def test_the_command_explains_itself() -> None:
    result = RUNNER.invoke(app, ["generate", "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 8


@pytest.mark.usefixtures("pulled_base", "pulled_encoder")
def test_an_adapter_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(tensors: object, path: Path) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "made"
    order = ["generate", "Write the date in German as JSON", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", interrupted)
        assert RUNNER.invoke(app, order).exit_code == 130
        assert not list(tmp_path.iterdir())
    assert RUNNER.invoke(app, order).exit_code == 0
    (out / "card.json").write_text("{}")
    assert RUNNER.invoke(app, [*order, "--overwrite"]).exit_code == 0
    assert list(tmp_path.iterdir()) == [out]
    files = {"adapter_config.json", "adapter_model.safetensors", "loraplex_card.json"}
    assert {path.name for path in out.iterdir()} == files
