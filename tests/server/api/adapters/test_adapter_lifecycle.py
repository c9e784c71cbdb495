"""PUT, GET, DELETE, pin and warm of adapters; vLLM's endpoints over the same store."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.leasing import AdapterLease
from loraplex_adapter_store.names.name_syntax import is_valid_name
from loraplex_server.engine.errors import EngineDead
from loraplex_server.services import device_follows, parts_of
from tests.server.conftest import Front, make_front
from tests.support.adapters.lora_files import write_lora

pytestmark = pytest.mark.anyio


def files_of(folder: Path) -> dict[str, tuple[str, bytes]]:
    return {
        "config": ("adapter_config.json", (folder / "adapter_config.json").read_bytes()),
        "weights": (
            "adapter_model.safetensors",
            (folder / "adapter_model.safetensors").read_bytes(),
        ),
    }


async def put(front: Front, name: str, source: str, **headers: str) -> httpx.Response:
    return await front.client.put(
        f"/v1/adapters/{name}", json={"source": source}, headers=headers or None
    )


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


async def test_an_adapter_is_put_from_a_registered_directory(
    front: Front, base_spec: BaseSpec
) -> None:
    write_lora(front.root / "x", base_spec)
    answer = await put(front, "team/x", "x")
    assert answer.status_code == 201, answer.text
    assert answer.headers["etag"] == f'"{answer.json()["digest"]}"'
    summary = answer.json()["report"]
    assert summary["n_matched"] > 0
    assert summary["delta_ratio"]["min"] <= summary["delta_ratio"]["max"]
    assert "matched" not in summary
    assert len(answer.content) < 2000
    assert (await front.chat(adapter="team/x")).status_code == 200
    assert (await put(front, "team/x", "x")).status_code == 200  # there already


async def test_a_description_and_examples_are_kept(front: Front, base_spec: BaseSpec) -> None:
    write_lora(front.root / "x", base_spec)
    body = {"source": "x", "description": "talks like a pirate", "examples": ["Ahoy"]}
    await front.client.put("/v1/adapters/x", json=body)
    shown = (await front.client.get("/v1/adapters/x")).json()
    assert shown["description"] == "talks like a pirate"
    assert shown["examples"] == ["Ahoy"]


async def test_an_absolute_path_below_a_registered_directory_is_accepted(
    front: Front, base_spec: BaseSpec
) -> None:
    folder = write_lora(front.root / "x", base_spec)
    assert (await put(front, "x", str(folder))).status_code == 201


async def test_an_adapter_is_uploaded_as_config_and_weights(
    front: Front, base_spec: BaseSpec, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path / "local", base_spec, seed=3)
    data = {"description": "uploaded", "examples": '["a"]', "chat_template": "{{ 'x' }}"}
    answer = await front.client.put("/v1/adapters/up", files=files_of(folder), data=data)
    assert answer.status_code == 201, answer.text
    assert answer.json()["description"] == "uploaded"
    await front.chat(adapter="up")
    assert front.engine.tokenizer.decode(list(front.engine.requests[0].prompt_ids)) == "x"
    assert front.store.put_directory("same", folder).family.value == "lora"


@pytest.mark.parametrize(
    "told", [{"description": "x" * 2001}, {"examples": ["x"] * 101}, {"examples": ["x" * 2001]}]
)
async def test_what_an_upload_says_is_limited_as_in_json(
    front: Front, base_spec: BaseSpec, told: dict[str, Any]
) -> None:
    files = files_of(write_lora(front.root / "x", base_spec))
    form = {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items()}
    upload = await front.client.put("/v1/adapters/x", files=files, data=form)
    source = await front.client.put("/v1/adapters/x", json={"source": "x", **told})
    assert upload.status_code == source.status_code == 400
    assert upload.json() == source.json()
    assert (await front.client.get("/v1/adapters/x")).status_code == 404


async def test_an_upload_is_written_once_beside_the_store_and_never_in_tmp(
    front: Front, base_spec: BaseSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of(write_lora(tmp_path / "local", base_spec))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))  # nothing can be made there
    staging = tmp_path / "store" / "staging"
    assert staging.is_dir()
    assert (await front.client.put("/v1/adapters/up", files=files)).status_code == 201
    files["weights"] = ("x", b"not safetensors" * 200_000)
    assert (await front.client.put("/v1/adapters/up", files=files)).status_code == 400
    assert list(staging.iterdir()) == []


@pytest.mark.parametrize("missing", ["config", "weights"])
async def test_an_upload_without_a_part_is_a_400(
    front: Front, base_spec: BaseSpec, tmp_path: Path, missing: str
) -> None:
    files = files_of(write_lora(tmp_path / "local", base_spec))
    del files[missing]
    answer = await front.client.put("/v1/adapters/up", files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == missing


async def test_bad_uploads_change_nothing(
    front: Front, base_spec: BaseSpec, tmp_path: Path
) -> None:
    files = files_of(write_lora(tmp_path / "local", base_spec))
    name, weights = files["weights"]
    for broken in (weights[:100], b"", weights[:-1], b"\x80\x04pickle"):
        answer = await front.client.put(
            "/v1/adapters/up", files={**files, "weights": (name, broken)}
        )
        assert answer.status_code == 400, answer.text
    extra = {**files, "surprise": ("x", b"x")}
    assert code_of(await front.client.put("/v1/adapters/up", files=extra)) == "bad_upload"
    head = {"content-type": "multipart/form-data; boundary=x"}
    answer = await front.client.put("/v1/adapters/up", content=b"--y\r\n", headers=head)
    assert answer.status_code == 400
    answer = await front.client.put(
        "/v1/adapters/up", content=b"zip", headers={"content-type": "a/b"}
    )
    assert answer.status_code == 415
    assert front.store.list() == ()


@pytest.mark.parametrize("name", ["auto", "base", "..", "a//b", "-x", "a,b", "x" * 129])
async def test_names_that_are_none_are_a_400(
    front: Front, base_spec: BaseSpec, tmp_path: Path, name: str
) -> None:
    files = files_of(write_lora(tmp_path / "local", base_spec))
    answer = await front.client.put(f"/v1/adapters/{name}", files=files)
    assert answer.status_code in (400, 404, 405)
    assert front.store.list() == ()


@pytest.mark.parametrize("name", ["generate", "train", "org/pin", "org/routing"])
async def test_a_name_that_a_route_has_is_refused_with_a_remedy(
    front: Front, base_spec: BaseSpec, name: str
) -> None:
    write_lora(front.root / "poet", base_spec)
    loaded = {"lora_name": name, "lora_path": "poet"}
    for answer, status in (
        (await put(front, name, "poet"), 405),
        (await front.post("/v1/load_lora_adapter", loaded), 400),
    ):
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        assert f"{name!r} is not an adapter name" in message
        assert "choose" in message
    assert front.store.list() == ()


def test_every_route_beside_the_adapters_own_is_no_name(front: Front) -> None:
    paths = front.app.openapi()["paths"]
    below = {path.removeprefix("/v1/adapters/") for path in paths if "/v1/adapters/" in path}
    assert len(below) > 8
    for path in below - {"{name}"}:
        assert not is_valid_name(path.replace("{name}", "x")), path


async def test_if_match_makes_a_put_compare_and_set(front: Front, base_spec: BaseSpec) -> None:
    for number in range(3):
        write_lora(front.root / f"v{number}", base_spec, seed=number)
    first = (await put(front, "x", "v0")).headers["etag"]
    answer = await put(front, "x", "v1", **{"if-match": first})
    assert answer.status_code == 200
    second = answer.headers["etag"]
    assert second != first
    stale = await put(front, "x", "v2", **{"if-match": first})
    assert stale.status_code == 412
    assert stale.headers["etag"] == second
    assert stale.headers["x-should-retry"] == "false"
    assert (await front.client.get("/v1/adapters/x")).headers["etag"] == second
    assert (await put(front, "x", "v2", **{"if-match": '"abc"'})).status_code == 400
    assert (await put(front, "x", "v2", **{"if-none-match": "*"})).status_code == 412


async def test_a_running_request_keeps_the_revision_it_started_with(
    front: Front, base_spec: BaseSpec
) -> None:
    for number in range(2):
        write_lora(front.root / f"v{number}", base_spec, seed=number)
    old = (await put(front, "x", "v0")).json()["digest"]
    front.engine.manual = True
    asking = asyncio.create_task(front.chat(adapter="x", max_tokens=1))
    await front.engine.arrival()
    new = (await put(front, "x", "v1")).json()["digest"]
    front.engine.step()
    assert (await asking).json()["adapter"]["digest"] == old
    asking = asyncio.create_task(front.chat(adapter="x", max_tokens=1))
    await front.engine.arrival(2)
    front.engine.step()
    assert (await asking).json()["adapter"]["digest"] == new


async def test_delete_waits_for_running_requests_and_reports_the_bytes(lora: Front) -> None:
    lora.store.acquire("pirate").release()
    lora.engine.manual = True
    asking = asyncio.create_task(lora.chat(adapter="pirate", max_tokens=1))
    await lora.engine.arrival()
    deleting = asyncio.create_task(lora.client.delete("/v1/adapters/pirate"))
    while (await lora.client.get("/v1/adapters/pirate")).status_code == 200:
        await asyncio.sleep(0)  # until the name is gone
    assert not deleting.done()
    assert (await lora.chat(adapter="pirate")).status_code == 404
    lora.engine.step()
    assert (await asking).status_code == 200
    report = (await deleting).json()
    assert report["deleted"]
    assert report["drained"]
    assert report["n_bytes_freed"]["disk"] > 0
    assert report["n_bytes_freed"]["host"] > 0


async def test_delete_of_nothing_or_of_another_revision_changes_nothing(lora: Front) -> None:
    assert (await lora.client.delete("/v1/adapters/nobody")).status_code == 404
    stale = {"if-match": f'"{"0" * 64}"'}
    assert (await lora.client.delete("/v1/adapters/pirate", headers=stale)).status_code == 412
    assert (await lora.client.delete("/v1/adapters/pirate?timeout_s=x")).status_code == 400
    assert (await lora.client.get("/v1/adapters/pirate")).status_code == 200


async def test_of_many_puts_of_a_new_name_one_has_made_it(
    front: Front, base_spec: BaseSpec
) -> None:
    for number in range(6):
        write_lora(front.root / f"v{number}", base_spec, seed=number)
    answers = await asyncio.gather(*[put(front, "x", f"v{number}") for number in range(6)])
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [201]


class Device:
    """A device tier that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.dead = False

    def set_pinned(self, digest: str, pinned: bool) -> None:
        self.told.append(("pin" if pinned else "unpin", digest))

    def warm(self, adapter: AdapterLease) -> None:
        self.told.append(("warm", adapter.digest))

    async def unload(self, digest: str) -> int:
        if self.dead:
            raise EngineDead("the engine thread stopped")
        self.told.append(("unload", digest))
        return 4096


@pytest.fixture
def on_device(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[tuple[Front, Device]]:
    """A front whose engine has a device, and the adapter ``poet``."""
    device = Device()
    front = make_front(tokenizer, base_spec, tmp_path, tier=device)
    front.store.put_directory("poet", write_lora(front.root / "poet", base_spec))
    yield front, device
    front.store.close()


async def test_pin_unpin_warm_and_delete_reach_the_device(
    on_device: tuple[Front, Device],
) -> None:
    front, device = on_device
    device_follows(parts_of(front.app))
    digest = front.store.get("poet").digest
    for action in ("pin", "unpin", "warm"):
        answer = await front.client.post(f"/v1/adapters/poet/{action}")
        assert answer.status_code == 200, answer.text
        assert answer.json()["pinned"] is (action == "pin")
        assert answer.json()["tier"] == "host"
        assert (await front.client.post(f"/v1/adapters/nobody/{action}")).status_code == 404
    report = (await front.client.delete("/v1/adapters/poet")).json()
    assert report["n_bytes_freed"]["device"] == 4096
    assert device.told == [(what, digest) for what in ("pin", "unpin", "warm", "unload")]


async def test_the_last_name_but_one_takes_nothing_off_the_device(
    on_device: tuple[Front, Device], base_spec: BaseSpec
) -> None:
    front, device = on_device
    device_follows(parts_of(front.app))
    front.store.put_directory("bard", write_lora(front.root / "bard", base_spec))
    assert front.store.get("bard").digest == front.store.get("poet").digest
    report = (await front.client.delete("/v1/adapters/bard")).json()
    assert report["n_bytes_freed"] == {"disk": 0, "host": 0, "device": 0}
    assert device.told == []
    assert (await front.client.delete("/v1/adapters/poet")).json()["n_bytes_freed"]["device"] > 0


async def test_weights_stay_pinned_on_the_device_while_one_of_their_names_is(
    on_device: tuple[Front, Device],
) -> None:
    front, device = on_device
    device_follows(parts_of(front.app))
    front.store.put_directory("twin", front.root / "poet")
    digest = front.store.get("poet").digest
    for name, action, told in (
        ("poet", "pin", ["pin"]),
        ("twin", "pin", ["pin"]),
        ("poet", "unpin", ["pin"]),
        ("twin", "unpin", ["pin", "unpin"]),
    ):
        answer = await front.client.post(f"/v1/adapters/{name}/{action}")
        assert answer.status_code == 200, answer.text
        assert device.told == [(what, digest) for what in told], (name, action)


async def test_a_dead_engine_answers_every_change_with_503_at_once(
    on_device: tuple[Front, Device],
) -> None:
    front, _ = on_device
    front.engine.die()
    calls = [
        front.client.delete("/v1/adapters/poet"),
        front.client.put("/v1/adapters/poet", json={"source": "poet"}),
        *[
            front.client.post(f"/v1/adapters/poet/{what}")
            for what in ("pin", "unpin", "warm", "unload", "rollback")
        ],
        front.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "poet"}),
        front.post("/v1/unload_lora_adapter", {"lora_name": "poet"}),
        front.chat(adapter="poet"),
        front.complete(),
        front.client.get("/health"),
        front.client.get("/ready"),
    ]
    for answer in await asyncio.wait_for(asyncio.gather(*calls), 30):
        assert (answer.status_code, code_of(answer)) == (503, "engine_dead")
    assert (await front.client.get("/v1/adapters/poet")).status_code == 200  # still told of


@pytest.mark.parametrize("call", [("DELETE", ""), ("POST", "/unload")], ids=" ".join)
async def test_what_the_engine_dies_under_is_a_503(
    on_device: tuple[Front, Device], call: tuple[str, str]
) -> None:
    front, device = on_device
    device_follows(parts_of(front.app))
    device.dead = True  # it dies between the check and the unload
    answer = await front.client.request(call[0], f"/v1/adapters/poet{call[1]}")
    assert (answer.status_code, code_of(answer)) == (503, "engine_dead")


async def test_a_slow_load_is_a_job_with_a_result(front: Front, base_spec: BaseSpec) -> None:
    write_lora(front.root / "x", base_spec)
    body = {"source": "x", "wait": False}
    answer = await front.client.put("/v1/adapters/x", json=body)
    assert answer.status_code == 202
    where = answer.headers["location"]
    while (job := (await front.client.get(where)).json())["status"] == "running":
        await asyncio.sleep(0.005)
    assert job["status"] == "succeeded"
    assert job["progress"] == 1.0
    assert job["digest"] == (await front.client.get("/v1/adapters/x")).json()["digest"]
    assert (await front.client.get("/v1/jobs/job-0")).status_code == 404


async def test_a_job_that_fails_says_why(front: Front) -> None:
    (front.root / "empty").mkdir()
    answer = await front.client.put("/v1/adapters/x", json={"source": "empty", "wait": False})
    where = answer.headers["location"]
    while (job := (await front.client.get(where)).json())["status"] == "running":
        await asyncio.sleep(0.005)
    assert job["status"] == "failed"
    assert "adapter_config.json" in job["error"]["message"]


async def test_a_job_that_breaks_tells_the_log_everything_and_the_client_where_to_look(
    front: Front, base_spec: BaseSpec, caplog: pytest.LogCaptureFixture
) -> None:
    write_lora(front.root / "x", base_spec)
    staging = front.store.state.files._staging
    staging.rmdir()
    staging.write_text("a file where a folder belongs")  # no upload can be staged
    answer = await front.client.put("/v1/adapters/x", json={"source": "x"})
    assert (answer.status_code, code_of(answer)) == (503, "storage_unavailable")
    message = answer.json()["error"]["message"]
    assert "job-" in message
    assert str(front.root.parent) not in message
    assert "Traceback" in caplog.text
    assert "NotADirectoryError" in caplog.text


async def test_bytes_on_disk_are_those_of_the_files(lora: Front) -> None:
    card = (await lora.client.get("/v1/adapters/pirate")).json()
    digest = card["digest"]
    files = list((lora.store.root / "contents" / digest[:2] / digest).iterdir())
    assert {"adapter_model.safetensors", "plan.bin"} <= {file.name for file in files}
    assert card["n_bytes"]["disk"] == sum(file.stat().st_size for file in files)


async def test_the_list_is_short_and_the_card_is_whole(lora: Front) -> None:
    body = (await lora.client.get("/v1/adapters")).json()
    assert [card["name"] for card in body["data"]] == ["org/poet", "pirate"]
    assert all("report" not in card for card in body["data"])
    card = (await lora.client.get("/v1/adapters/pirate")).json()
    assert card["family"] == "lora"
    assert card["ranks"] == [4]
    assert card["report"]["unexpected_keys"] == []
    assert "modules" not in card["report"]
    full = (await lora.client.get("/v1/adapters/pirate?report=full")).json()["report"]
    assert len(full["matched"]) == card["report"]["n_matched"]
    assert len(full["modules"]) == card["report"]["n_modules"]
    assert (await lora.client.get("/v1/adapters/pirate?report=all")).status_code == 400


async def test_vllm_s_load_and_unload_answer_as_vllm_does(
    front: Front, base_spec: BaseSpec
) -> None:
    folder = write_lora(front.root / "sql", base_spec)
    payload = {"lora_name": "sql", "lora_path": str(folder)}
    answer = await front.post("/v1/load_lora_adapter", payload)
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'sql' added successfully."
    assert (await front.chat(model="sql")).status_code == 200

    again = await front.post("/v1/load_lora_adapter", payload)
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    assert "already been loaded" in again.json()["error"]["message"]
    in_place = await front.post("/v1/load_lora_adapter", {**payload, "load_inplace": True})
    assert in_place.status_code == 200

    answer = await front.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
    assert answer.text == "Success: LoRA adapter 'sql' removed successfully."
    answer = await front.post("/v1/unload_lora_adapter", {"lora_name": "sql"})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "NotFoundError"
    assert (await front.chat(model="sql")).status_code == 404


@pytest.mark.parametrize("payload", [{}, {"lora_name": "x"}, {"lora_path": "x"}])
async def test_vllm_s_load_without_a_field_is_invalid_user_input(
    front: Front, payload: dict[str, str]
) -> None:
    answer = await front.post("/v1/load_lora_adapter", payload)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "InvalidUserInput"


async def test_changes_need_a_json_content_type_that_no_web_form_can_send(front: Front) -> None:
    answer = await front.client.post("/v1/load_lora_adapter", content=b"{}")
    assert answer.status_code == 415
