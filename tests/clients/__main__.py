"""Every client against one real server: ``make clients``, or

    python -m tests.clients ENVIRONMENTS [pytest's arguments]

The clients run in Pythons of their own, so that what they bring along never meets the server's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from loraplex_server.model.pull import DEFAULT_BASE, DEFAULT_ENCODER, pull
from tests.clients.table import write_table
from tests.support.server_process import server_process

_CLIENTS = {  # of each dependency group in pyproject.toml
    "clients-openai-3": ("openai", "anthropic", "langchain", "litellm", "llm", "pydantic_ai"),
    "clients-openai-2": ("openai", "llama_index"),
    "clients-open-webui": ("open_webui",),
}
_FLAGS = (
    *("--demos", "--dtype", "bfloat16", "--threads", "2"),
    *("--kv-memory", "256MiB", "--adapter-memory", "128MiB"),
)
_PAGE = Path("docs/clients.md")
_TEST_S = 900  # other work may hold the machine


def main(environments: Path, arguments: list[str]) -> int:
    """0 if every test passed.

    Without arguments the page is written after each client, marked as partial until the last one.
    """
    pull(DEFAULT_ENCODER)
    statuses: list[int] = []
    to_run = [(group, client) for group, clients in _CLIENTS.items() for client in clients]
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-clients-") as folder,
        server_process(pull(DEFAULT_BASE), Path(folder) / "state", *_FLAGS) as server,
    ):
        results = Path(folder) / "results.jsonl"
        for group, client in to_run:
            python = environments / group / "bin/python"
            statuses.append(_run(python, client, arguments, server.url, results))
            if not arguments:
                missing = [f"{name} ({group})" for group, name in to_run[len(statuses) :]]
                write_table(_PAGE, results, missing)
        print(server.log if any(statuses) else "", end="")
    return max(statuses)


def _run(python: Path, client: str, arguments: list[str], url: str, results: Path) -> int:
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "LORAPLEX_CLIENTS_URL": url,
        "LORAPLEX_CLIENTS_RESULTS": str(results),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import reads a web page
    }
    # what the clients warn about is not ours
    options = ["--confcutdir=tests/clients", "-W", "ignore", f"--timeout={_TEST_S}", *arguments]
    command = [python, "-m", "pytest", f"tests/clients/test_{client}.py", *options]
    return subprocess.call(command, env=environment)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
