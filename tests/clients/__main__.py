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

_FILES = {  # of each dependency group in pyproject.toml
    "clients-openai-3": ("openai", "anthropic", "langchain", "litellm", "llm", "pydantic_ai"),
    "clients-openai-2": ("openai", "llama_index"),
}
_FLAGS = (
    *("--demos", "--dtype", "bfloat16", "--threads", "2"),
    *("--kv-memory", "256MiB", "--adapter-memory", "128MiB"),
)


def main(environments: Path, arguments: list[str]) -> int:
    """0 if every test passed. The page is written if all of them ran."""
    pull(DEFAULT_ENCODER)
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-clients-") as folder,
        server_process(pull(DEFAULT_BASE), Path(folder) / "state", *_FLAGS) as server,
    ):
        results = Path(folder) / "results.jsonl"
        statuses = [
            _run(environments / group / "bin/python", names, arguments, server.url, results)
            for group, names in _FILES.items()
        ]
        if not arguments:
            write_table(Path("docs/clients.md"), results)
        print(server.log if any(statuses) else "", end="")
        return max(statuses)


def _run(
    python: Path, names: tuple[str, ...], arguments: list[str], url: str, results: Path
) -> int:
    files = [f"tests/clients/test_{name}.py" for name in names]
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        "LORAPLEX_CLIENTS_URL": url,
        "LORAPLEX_CLIENTS_RESULTS": str(results),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import reads a web page
    }
    # "-W default": what the clients warn about is not ours
    options = ["--confcutdir=tests/clients", "-W", "default", *arguments]
    return subprocess.call([python, "-m", "pytest", *files, *options], env=environment)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
