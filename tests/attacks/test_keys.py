"""What a line that somebody forgot in the keys file opens: nothing."""

import hashlib
from pathlib import Path

import httpx
import pytest

from loraplex_adapter_store.base_spec import BaseSpec
from tests.support.adapters.lora_files import write_lora
from tests.support.bases.architectures import tiny_model
from tests.support.servers.server_process import save_tiny_model, server_process

pytestmark = pytest.mark.slow
KEYS = {"acme-ci": 'tenant = "acme"', "globex": "", "root": "operator = true"}


def test_an_admin_key_without_tenant_is_a_tenant_of_its_own(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora", BaseSpec.of(tiny_model(), "model"))
    model = save_tiny_model(tmp_path / "model")

    def start(*names: str):  # type: ignore[no-untyped-def]
        tables = (
            f'[[key]]\nname = "{name}"\nscope = "admin"\n{KEYS[name]}\n'
            f'sha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
            for name in names
        )
        (tmp_path / "keys.toml").write_text("".join(tables))
        return server_process(model, tmp_path / "state", "--keys", tmp_path / "keys.toml")

    with start("acme-ci", "globex", "root") as server:

        def ask(key: str, method: str, path: str, **options: object) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            url = f"{server.url}/v1/adapters{path}"
            return httpx.request(method, url, headers=headers, timeout=60, **options)  # type: ignore[arg-type]

        def names(key: str) -> list[str]:
            return [card["name"] for card in ask(key, "GET", "").json()["data"]]

        for key in KEYS:
            files = {
                "config": (adapter / "adapter_config.json").read_bytes(),
                "weights": (adapter / "adapter_model.safetensors").read_bytes(),
            }
            put = ask(key, "PUT", f"/of-{key}", files=files)
            assert put.status_code == 201, put.text
        assert names("globex") == ["of-globex", "of-root"]
        assert names("acme-ci") == ["of-acme-ci", "of-root"]
        assert names("root") == ["acme:of-acme-ci", "globex:of-globex", "of-root"]
        for name in ("of-acme-ci", "acme:of-acme-ci"):
            assert ask("globex", "DELETE", f"/{name}").status_code in (403, 404)
        assert "see all tenants: root; " in server.log
    with start("acme-ci", "globex") as server:
        assert "WARNING" in server.log
        assert "see all tenants: none; " in server.log
        assert "globex of tenant globex" in server.log
