"""Tenants of Tinker's API see only their own, and silent sessions end."""

import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from tests.server.tinker.conftest import connected, datum, new_client, step
from tests.support.servers.server_process import ServerProcess, server_process

_KEY = '[[key]]\nname = "{0}"\nsha256 = "{1}"\nscope = "{2}"\ntenant = "{3}"\n'
_KEYS = (("acme", "admin", "acme"), ("umbra", "admin", "umbra"), ("reader", "infer", "acme"))


@pytest.fixture(scope="module")
def keyed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("keyed")
    keys = [
        _KEY.format(name, hashlib.sha256(f"tml-{name}".encode()).hexdigest(), scope, tenant)
        for name, scope, tenant in _KEYS
    ]
    (folder / "keys.toml").write_text("\n".join(keys))
    flags = ("--allow-training", "--keys", folder / "keys.toml", "--max-training-clients", "5")
    with server_process(tiny_base, folder / "state", *flags) as server:
        yield server


def test_tenants_see_only_their_own(keyed: ServerProcess) -> None:
    with connected(keyed, "tml-acme") as ours, connected(keyed, "tml-umbra") as theirs:
        client = new_client(ours)
        client.forward_backward([datum([5, 6, 7])], "cross_entropy")
        step(client, 1e-2)
        state = client.save_state("mine").result().path
        weights = client.save_weights_for_sampler("mine").result().path
        sampler = ours.create_sampling_client(weights).result()
        with pytest.raises(tinker.NotFoundError):
            theirs.create_training_client_from_state(state).result()
        with pytest.raises(tinker.NotFoundError):
            theirs.create_sampling_client(weights).result()
        session = ours.holder.get_session_id()
        sampler_id = sampler._sampling_session_id
        call = {"model_id": client.model_id, "seq_id": 9}
        sampled = {
            "sampling_session_id": sampler_id,
            "seq_id": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5]}]},
            "sampling_params": {"max_tokens": 1},
        }
        posts = {
            "session_heartbeat": {"session_id": session},
            f"sessions/{session}/finish": {},
            "create_model": {"session_id": session, "model_seq_id": 3, "base_model": "tiny"},
            "get_info": {"model_id": client.model_id},
            "optim_step": call | {"adam_params": {}},
            "save_weights": call | {"path": "x"},
            "save_weights_for_sampler": call | {"path": "x"},
            "create_sampling_session": {"session_id": session, "sampling_session_seq_id": 7},
            "join_sampling_session": {"sampling_session_id": sampler_id},
            "asample": sampled,
            "retrieve_future": {"request_id": f"{client.model_id}:1"},
            "cancel_future": {"request_id": f"{sampler_id}:0"},
            "weights_info": {"tinker_path": state},
        }
        run = f"training_runs/{client.model_id}"
        with httpx.Client(
            base_url=f"{keyed.url}/api/v1/", headers={"x-api-key": "tml-umbra"}
        ) as foreign:
            for path, body in posts.items():
                status = foreign.post(path, json=body).status_code
                assert status == (410 if path == "session_heartbeat" else 404), path
            for path in (f"sessions/{session}", f"samplers/{sampler_id}", run):
                assert foreign.get(path).status_code == 404, path
            assert foreign.delete(f"{run}/checkpoints/weights/mine").status_code == 404
            assert session not in foreign.get("sessions").json()["sessions"]
            assert foreign.get("training_runs").json()["training_runs"] == []
            assert foreign.get("checkpoints").json()["checkpoints"] == []
            names = foreign.get(f"{keyed.url}/v1/models").json()["data"]
            assert not any(each["id"].startswith("tinker/") for each in names)
        assert sampler.compute_logprobs(types.ModelInput.from_ints([5, 6])).result()


def test_a_key_without_changes_samples_and_trains_nothing(keyed: ServerProcess) -> None:
    with connected(keyed, "tml-acme") as ours:
        client = new_client(ours)
        client.forward_backward([datum([5, 6, 7])], "cross_entropy")
        step(client, 1e-2)
        path = client.save_weights_for_sampler("shared").result().path
        with connected(keyed, "tml-reader") as reader:
            sampler = reader.create_sampling_client(path).result()
            assert sampler.compute_logprobs(types.ModelInput.from_ints([5, 6])).result()
            with pytest.raises(tinker.PermissionDeniedError, match="lacks the scope 'admin'"):
                new_client(reader)
    with pytest.raises(tinker.AuthenticationError), connected(keyed, "tml-nobody"):
        pass


def test_the_number_of_training_clients_is_bounded(keyed: ServerProcess) -> None:
    with connected(keyed, "tml-acme") as ours, connected(keyed, "tml-umbra") as theirs:
        for _ in range(4):
            new_client(ours)
        with pytest.raises(tinker.RequestFailedError, match="4 training clients are open, and 4"):
            new_client(ours)
        new_client(theirs)
        with pytest.raises(tinker.RequestFailedError, match="5 training clients are open, and 5"):
            new_client(theirs)
    with connected(keyed, "tml-acme") as ours:
        new_client(ours)  # the ended sessions made room


def test_a_silent_session_ends_and_makes_room(tiny_base: Path, tmp_path: Path) -> None:
    flags = ("--allow-training", "--session-timeout", "1", "--max-training-clients", "1")
    with (
        server_process(tiny_base, tmp_path / "state", *flags) as server,
        httpx.Client(base_url=f"{server.url}/api/v1/") as client,
    ):
        session = _new_session(client)
        created = _create_model(client, session)
        assert "model_id" in _result(client, created)
        _until(lambda: client.get("sessions").json()["sessions"] == [])
        assert client.post("session_heartbeat", json={"session_id": session}).status_code == 410
        assert client.post("get_info", json={"model_id": created["model_id"]}).status_code == 404
        assert "model_id" in _result(client, _create_model(client, _new_session(client)))


def test_a_server_without_training_samples_and_says_so(tiny_base: Path, tmp_path: Path) -> None:
    with server_process(tiny_base, tmp_path) as server, connected(server) as service:
        sampler = service.create_sampling_client(base_model="tiny").result()
        assert sampler.compute_logprobs(types.ModelInput.from_ints([5, 6])).result()
        with pytest.raises(tinker.RequestFailedError, match="start it with --allow-training"):
            new_client(service)


def _new_session(client: httpx.Client) -> str:
    body = {"tags": [], "user_metadata": {}, "sdk_version": "0"}
    return str(client.post("create_session", json=body).json()["session_id"])


def _create_model(client: httpx.Client, session: str) -> dict[str, str]:
    body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
    created: dict[str, str] = client.post("create_model", json=body).json()
    return created


def _result(client: httpx.Client, call: dict[str, str]) -> dict[str, str]:
    answer = client.post("retrieve_future", json={"request_id": call["request_id"]}, timeout=60)
    result: dict[str, str] = answer.json()
    return result


def _until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
