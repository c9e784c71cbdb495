"""`loraplex adapters verify` on the directory of a real server, damaged in each way that disks do.

Each adapter answers every prompt with a token of its own (`tests/soak/marked.py`).
"""

import json
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from loraplex_server.cli.app import app
from tests.soak.marked import Content, save_marked_base, write_contents
from tests.support.servers.server_process import failing_start, server_process

PUTS = (("a", 0), ("a", 1), ("a", 2), ("b", 3), ("team/c", 4), ("twin", 4))
WHOLE = {"a": 12, "b": 13, "team/c": 14, "twin": 14}  # name → token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verified")


@pytest.fixture(scope="module")
def contents(folder: Path) -> list[Content]:
    return write_contents(save_marked_base(folder / "base"), folder / "files", 5)


@pytest.fixture(scope="module")
def used(folder: Path, contents: list[Content]) -> Path:
    """The directory of a server that was killed."""
    with server_process(folder / "base", folder / "used") as server:
        for name, index in PUTS:
            _put(server.url, name, contents[index])
        answer = CliRunner().invoke(app, ["adapters", "verify", str(folder / "used"), "--repair"])
        assert answer.exit_code == 1
        assert "stop the server" in answer.output
        assert verify(folder / "used", 0) == []
    return folder / "used"


@pytest.fixture
def state(used: Path, tmp_path: Path) -> Path:
    return shutil.copytree(used, tmp_path / "state")


def _put(url: str, name: str, content: Content) -> None:
    files = {"config": content.config, "weights": content.weights}
    httpx.put(f"{url}/v1/adapters/{name}", files=files, timeout=60).raise_for_status()


def verify(state: Path, status: int, *words: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(app, ["adapters", "verify", str(state), "--json", *words])
    assert result.exit_code == status, result.output
    found: list[dict[str, object]] = json.loads(result.stdout.splitlines()[0])["problems"]
    return found


def answers(base: Path, state: Path) -> dict[str, int]:
    """Start a server on the directory, and return the token that each of its names answers."""
    tokens = {}
    with server_process(base, state) as server:
        for name in [
            each["name"] for each in httpx.get(f"{server.url}/v1/adapters").json()["data"]
        ]:
            body = {"adapter": name, "prompt": "x", "max_tokens": 4, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            (tokens[name],) = set(answer.json()["choices"][0]["token_ids"])
    return tokens


def files_of(state: Path, name: str) -> Path:
    with closing(sqlite3.connect(state / "registry.sqlite3")) as db:
        (text,) = db.execute("SELECT state FROM states WHERE name = ?", (name,)).fetchone()
    digest = json.loads(text)["value"]["revisions"][0]["content"]["digest"]
    return state / "contents" / digest[:2] / digest


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def _turned_weights(state: Path) -> None:
    flip(files_of(state, "a") / "adapter_model.safetensors")


def _cut_plan(state: Path) -> None:
    plan = files_of(state, "b") / "plan.bin"
    plan.write_bytes(plan.read_bytes()[:-100])


def _other_config(state: Path) -> None:
    file = files_of(state, "b") / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))


def _lost_files(state: Path) -> None:
    shutil.rmtree(files_of(state, "twin"))


def _bad_record(state: Path) -> None:
    with closing(sqlite3.connect(state / "registry.sqlite3")) as db, db:
        turned = "CAST(replace(CAST(state AS TEXT), 'created', 'creates') AS BLOB)"
        db.execute(f"UPDATE states SET state = {turned} WHERE name = 'b'")


def _bad_registry(state: Path) -> None:
    for file in state.glob("registry.sqlite3-*"):
        file.unlink()
    (state / "registry.sqlite3").write_bytes(b"not a database" * 1000)


def _without(*names: str) -> dict[str, int]:
    return {name: mark for name, mark in WHOLE.items() if name not in names}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "fate", "left"),
    [
        (_turned_weights, "a falls back to revision 2", WHOLE | {"a": 11}),
        (_cut_plan, "b is removed", _without("b")),
        (_other_config, "b is removed", _without("b")),
        (_lost_files, "twin is removed", _without("team/c", "twin")),
        (_bad_record, "keeps its readable records", _without("b")),
        (_bad_registry, "keeps its readable records", {}),
    ],
)
def test_a_repair_keeps_what_is_good_and_deletes_nothing(
    damage: Callable[[Path], None], fate: str, left: Mapping[str, int], state: Path, folder: Path
) -> None:
    damage(state)
    before = _bytes_of(state)
    found = verify(state, 1)
    assert any(fate in str(problem["repair"]) for problem in found)
    assert _bytes_of(state) == before, "a check changes nothing"
    verify(state, 0, "--repair")
    assert verify(state, 0) == []
    kept = set(_bytes_of(state).values())
    assert {data for path, data in before.items() if "contents" in path.parts} <= kept
    assert answers(folder / "base", state) == left


def _bytes_of(state: Path) -> dict[Path, bytes]:
    """The files of a directory, without what SQLite rebuilds."""
    files = (path for path in state.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if path.suffix != ".sqlite3-shm"}


@pytest.mark.slow
def test_what_was_set_aside_can_be_added_again(state: Path, folder: Path) -> None:
    _cut_plan(state)
    digest = files_of(state, "b").name
    verify(state, 0, "--repair")
    (aside,) = (state / "damaged").glob(f"*/{digest}")
    with server_process(folder / "base", state) as server:
        words = ["adapters", "add", "b", str(aside), "--url", server.url]
        assert CliRunner().invoke(app, words).exit_code == 0
    assert answers(folder / "base", state) == WHOLE


@pytest.mark.slow
def test_left_overs_of_a_crash_are_no_damage(state: Path) -> None:
    (state / "staging" / "half").mkdir()
    (state / "staging" / "half" / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    shutil.copytree(files_of(state, "a"), state / "contents" / "ab" / ("ab" * 32))
    flip(next((state / "packed").glob("*/*")))
    assert {problem["is_damage"] for problem in verify(state, 0)} == {False}
    assert len(verify(state, 0, "--repair")) == 3
    assert verify(state, 0) == []
    assert not (state / "damaged").exists()


@pytest.mark.slow
def test_bytes_that_quotas_do_not_count_are_corrected(state: Path, folder: Path) -> None:
    (files_of(state, "b") / "notes.txt").write_bytes(b"x" * 777)
    (problem,) = verify(state, 1)
    assert problem["subject"] == "adapter b"
    verify(state, 0, "--repair")
    with server_process(folder / "base", state) as server:
        card = httpx.get(f"{server.url}/v1/adapters/b").json()
    assert card["n_bytes"]["disk"] == sum(f.stat().st_size for f in files_of(state, "b").iterdir())


@pytest.mark.slow
def test_a_server_does_not_start_where_it_would_sweep_adapters_away(
    state: Path, folder: Path
) -> None:
    (state / "registry.sqlite3").unlink()
    before = sorted((state / "contents").rglob("*"))
    status, log = failing_start("--model", folder / "base", "--state-dir", state, "--port", "0")
    assert status == 1
    assert "loraplex adapters verify --repair" in log
    assert sorted((state / "contents").rglob("*")) == before


def test_a_folder_that_is_no_state_directory_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["adapters", "verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "is not the state directory of a server" in result.output
