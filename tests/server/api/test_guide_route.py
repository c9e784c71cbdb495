"""/guide where the documentation is not built, and where the console is turned off."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from transformers import PreTrainedTokenizerFast

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_server.api.routes.pages import guide_router
from loraplex_server.settings.config import HttpConfig
from tests.server.conftest import Front, make_front

pytestmark = pytest.mark.anyio


async def test_a_guide_that_is_not_built_says_how_to_build_it_and_is_shown_once_it_is(
    tmp_path: Path,
) -> None:
    app = FastAPI()
    app.include_router(guide_router(tmp_path / "guide"))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answer = await client.get("/guide", follow_redirects=True)
        (tmp_path / "guide").mkdir()
        (tmp_path / "guide" / "index.html").write_text("<h1>Start</h1>")
        assert (await client.get("/guide", follow_redirects=True)).text == "<h1>Start</h1>"
    assert answer.status_code == 404
    assert "make docs" in answer.text
    assert answer.text.count("\n") == 1


@pytest.fixture
def no_console(
    tokenizer: PreTrainedTokenizerFast, base_spec: BaseSpec, tmp_path: Path
) -> Iterator[Front]:
    http = HttpConfig(served_model_names=("base",), console=False)
    front = make_front(tokenizer, base_spec, tmp_path, http)
    yield front
    front.close()


@pytest.mark.parametrize("path", ["/guide", "/guide/", "/guide/console/"])
async def test_without_a_console_there_is_no_guide(no_console: Front, path: str) -> None:
    answer = await no_console.client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"
