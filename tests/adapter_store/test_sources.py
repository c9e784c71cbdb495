"""Sources: directories, object stores, the Hub, web servers; versions are noted, sizes limited."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import LocalStore, MemoryStore

from loraplex_adapter_store.errors import (
    LimitExceeded,
    QuotaExceeded,
    SourceError,
    SourceForbidden,
)
from loraplex_adapter_store.limits import StoreLimits
from loraplex_adapter_store.names.put_options import PutOptions, Quota
from loraplex_adapter_store.plan import Family
from loraplex_adapter_store.sources.local import read_card
from loraplex_adapter_store.sources.uri import HubClient, HubCommit, download, fetch_hub, fetch_web
from loraplex_adapter_store.store import AdapterStore
from tests.adapter_store.conftest import MakeAdapter
from tests.support.bases.tiny_models import tiny_llama
from tests.support.servers.web_folder import web_folder


@pytest.mark.parametrize("form", ["{path}", "file://{path}"])
def test_a_directory_under_an_allowed_root_is_read(
    form: str, store: AdapterStore, make_adapter: MakeAdapter
) -> None:
    stages: list[str] = []
    path = make_adapter(1)
    card = store.put_source(
        "x", form.format(path=path), progress=lambda stage, share: stages.append(stage)
    )
    assert card.provenance == {"source": "directory", "path": str(path)}
    assert stages == ["fetch", "check", "done"]


def test_without_allowed_roots_no_directory_is_read(
    tmp_path: Path, base: Any, make_adapter: MakeAdapter
) -> None:
    with (
        AdapterStore(tmp_path / "s", base) as store,
        pytest.raises(SourceForbidden, match="outside"),
    ):
        store.put_source("x", str(make_adapter(1)))


def test_an_adapter_ships_its_chat_template(store: AdapterStore, make_adapter: MakeAdapter) -> None:
    path = make_adapter(1)
    plain = store.put_directory("plain", path).digest
    (path / "chat_template.jinja").write_text("{{ messages }}!")
    card = store.put_directory("x", path)
    assert card.digest != plain
    with store.acquire("x") as lease:
        assert lease.plan.chat_template == "{{ messages }}!"


def test_the_folder_of_a_fine_tuned_model_is_served_as_its_difference(
    store: AdapterStore, tmp_path: Path
) -> None:
    model = tiny_llama()
    with torch.no_grad():
        weight = model.get_submodule("model.layers.1.mlp.up_proj").weight
        weight += torch.ones(52, 1) @ torch.ones(1, 32) * 0.01
    model.save_pretrained(tmp_path / "adapters" / "tuned")
    card = store.put_source("tuned", str(tmp_path / "adapters" / "tuned"))
    assert card.family is Family.FULL
    assert card.report is not None
    assert card.report.kept_energy == pytest.approx(1.0)
    assert list(card.report.modules) == ["model.layers.1.mlp.up_proj"]


def test_objects_are_streamed_and_their_versions_noted(
    make_adapter: MakeAdapter, tmp_path: Path, store: AdapterStore
) -> None:
    memory = MemoryStore()
    source = make_adapter(1)
    for file in source.iterdir():
        memory.put(file.name, file.read_bytes())
    target = tmp_path / "fetched"
    target.mkdir()
    etags = download(memory, target, StoreLimits())
    assert set(etags) == {"adapter_config.json", "adapter_model.safetensors"}
    assert all(etags.values())
    digest = store.put_directory("x", target).digest
    assert digest == store.put_directory("y", source).digest


def test_objects_beyond_the_limit_stop_the_download(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    local = LocalStore(make_adapter(1))
    with pytest.raises(LimitExceeded):
        download(local, tmp_path, StoreLimits(max_file_bytes=64))
    with pytest.raises(SourceError, match=r"adapter_config\.json"):
        download(MemoryStore(), tmp_path, StoreLimits())


def test_a_folder_of_a_web_server_is_fetched_within_the_limits(
    make_adapter: MakeAdapter, store: AdapterStore, tmp_path: Path
) -> None:
    source = make_adapter(1)
    with web_folder(source) as web:
        card = store.put_source("x", web.url)
        assert web.asked == [
            "/adapter_config.json",
            "/adapter_model.safetensors",
            *("/chat_template.jinja", "/card.json"),
            *("/modules.json", "/1_Pooling/config.json", "/config.json"),
        ]
        with pytest.raises(LimitExceeded, match="adapter_model"):
            fetch_web(web.url, tmp_path, StoreLimits(max_file_bytes=64))
        with pytest.raises(SourceError, match="answered 404"):
            store.put_source("y", f"{web.url}/nowhere")
    assert card.provenance["source"] == "web"
    assert card.digest == store.put_directory("same", source).digest
    with pytest.raises(SourceError, match="cannot read"):
        store.put_source("y", web.url)  # the server is gone


def test_a_download_beyond_the_bytes_of_its_tenant_stops(
    make_adapter: MakeAdapter, store: AdapterStore
) -> None:
    options = PutOptions(quota=Quota(max_bytes=64))
    with web_folder(make_adapter(1)) as web:
        with pytest.raises(QuotaExceeded, match="max_bytes"):
            store.put_source("acme:x", web.url, options=options)
        assert web.asked == ["/adapter_config.json", "/adapter_model.safetensors"]  # no other file


class RecordedHub:
    """Stands at the network: what the Hub answered for one repository."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, source: Path, folder: str = "") -> None:
        """``folder``: where in the repository the files of ``source`` lie."""
        self.source = source
        self.n_bytes: dict[str, int | None] = {
            f"{folder}{file.name}": file.stat().st_size for file in source.iterdir()
        }
        self.asked: list[tuple[str, str | None]] = []

    def resolve(self, repo: str, revision: str | None) -> HubCommit:
        self.asked.append((repo, revision))
        if repo != "org/adapter":
            raise SourceError(f"repository {repo} not found")
        return HubCommit(self.commit, self.n_bytes)

    def snapshot(self, repo: str, commit: str, into: Path, patterns: tuple[str, ...]) -> None:
        assert commit == self.commit, "only a pinned commit is ever downloaded"
        for pattern in patterns:
            file = self.source / Path(pattern).name
            if file.is_file():
                target = into / pattern
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("uri", "folder", "revision"),
    [
        ("hf://org/adapter", "", None),
        ("hf://org/adapter@v1.2", "", "v1.2"),
        ("hf://org/adapter/sub/folder@main", "sub/folder/", "main"),
    ],
)
def test_a_hub_revision_is_resolved_to_a_commit_before_it_is_fetched(
    uri: str, folder: str, revision: str | None, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    source = make_adapter(1)
    (source / "card.json").write_text("{}")
    recorded = RecordedHub(source, folder)
    files, provenance = fetch_hub(uri, tmp_path, StoreLimits(), client=recorded)
    assert recorded.asked == [("org/adapter", revision)]
    assert provenance == {"source": "hub", "repo": "org/adapter", "commit": recorded.commit}
    assert files.weights.is_file()
    assert read_card(files, StoreLimits()) == b"{}"


@pytest.mark.parametrize("folder", ["", "sub/folder/"])
@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("adapter_model.safetensors", StoreLimits(max_file_bytes=64)),
        ("adapter_config.json", StoreLimits(max_config_bytes=64)),
    ],
)
def test_a_hub_file_beyond_the_limit_is_never_downloaded(
    folder: str, name: str, limits: StoreLimits, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    recorded = RecordedHub(make_adapter(1), folder)
    uri = f"hf://org/adapter/{folder}".rstrip("/")
    with pytest.raises(LimitExceeded, match=f"{name} exceeds 64 bytes"):
        fetch_hub(uri, tmp_path / "into", limits, client=recorded)
    recorded.n_bytes[f"{folder}{name}"] = None
    with pytest.raises(SourceError, match=f"not say how large {name} is"):
        fetch_hub(uri, tmp_path / "into", limits, client=recorded)
    assert not (tmp_path / "into").exists()


def test_the_hub_is_asked_how_large_the_files_of_the_commit_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    files = [{"rfilename": "a.json", "size": 7}, {"rfilename": "b.json"}]
    told = {"id": "org/adapter", "sha": RecordedHub.commit, "siblings": files}
    answer = tmp_path / "api" / "models" / "org" / "adapter"
    answer.parent.mkdir(parents=True)
    answer.write_text(json.dumps(told))
    with web_folder(tmp_path) as web:
        commit = HubClient(web.url).resolve("org/adapter", None)
        assert web.asked == ["/api/models/org/adapter?blobs=true"]
    assert commit == (RecordedHub.commit, {"a.json": 7, "b.json": None})


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_source(tmp_path: Path) -> None:
    closed = HubClient("http://127.0.0.1:9")
    with pytest.raises(SourceError, match="cannot fetch"):
        fetch_hub("hf://org/adapter", tmp_path, StoreLimits(), client=closed)


@pytest.mark.parametrize("uri", ["hf://org", "hf://org/a b", "hf://org/../../etc", "hf:///x/y"])
def test_a_malformed_hub_address_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not hf://"):
        fetch_hub(uri, tmp_path, StoreLimits())
