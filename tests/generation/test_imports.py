"""A server that answers a description imports nothing of research/, which no wheel holds."""

import os
import re
from pathlib import Path

import httpx
import pytest

from tests.support.servers.server_process import server_process

pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # tests/architecture forbids the import in CI
_ROOT = Path(__file__).resolve().parents[2]


def test_a_server_answers_descriptions_without_research(
    pulled_base: Path, pulled_encoder: Path, tmp_path: Path
) -> None:
    """From the sentence alone, and with examples; the log names every import."""
    path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])  # so that it could
    environment = {"PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": path}
    pairs = [{"prompt": "sea", "answer": '"sea"'}, {"prompt": "sky", "answer": '"sky"'}]
    with (
        server_process(
            pulled_base,
            tmp_path,
            "--adapter-memory=64MiB",
            warm=False,
            environment=environment,
        ) as server,
        httpx.Client(base_url=server.url, timeout=300) as client,
    ):
        order = {"description": "Write the date in German as JSON", "probe": False}
        made = client.post("/v1/adapters/generate", json=order)
        assert made.status_code == 201, made.text
        chat = {
            "adapter": {"description": "in quotes", "examples": pairs, "wait": True},
            "messages": [{"role": "user", "content": "sun"}],
            "max_tokens": 8,
        }
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        log = server.log
    imported = set(re.findall(r"import time:.*\|\s+(\S+)$", log, re.M))
    assert {
        "loraplex_generation.multi_task",
        "loraplex_training.engine.engine",
    } <= imported
    assert not {name for name in imported if name.partition(".")[0] in ("research", "tests")}
