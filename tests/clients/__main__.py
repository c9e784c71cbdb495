"""Every client against one real server: ``make clients``, or

    python -m tests.clients ENVIRONMENTS [pytest's arguments]

The clients run in Pythons of their own, so that what they bring along never meets the server's.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from loraplex_server.model.loading.pull import DEFAULT_BASE, DEFAULT_ENCODER, pull
from tests.clients.table import write_table
from tests.support.servers.server_process import server_process

CLIENTS = {  # the test files of each dependency group in pyproject.toml
    "clients-openai-3": (
        "openai",
        "vllm_lora",
        "anthropic",
        "langchain",
        "litellm",
        "llm",
        "pydantic_ai",
    ),
    "clients-openai-2": ("openai", "llama_index"),
    "clients-huggingface": ("huggingface_hub",),
    "clients-lorax": ("lorax",),
    "clients-sglang": ("sglang",),
    "clients-vllm": ("vllm_bench",),
    "clients-guidellm": ("guidellm",),
    "clients-open-webui": ("open_webui",),
    "clients-trl": ("trl",),
}
_DEMOS = Path("adapter_store/loraplex_adapter_store/demos").resolve()
_FLAGS = (
    *("--adapters-dir", _DEMOS),  # clients may load from it, too
    *("--dtype", "bfloat16"),
    *("--kv-memory", "256MiB", "--adapter-memory", "128MiB"),
)
_PAGE = Path("docs/clients.md")
_AT_ONCE = 5
_TEST_S = 1800  # other work may hold the machine


def main(environments: Path, arguments: list[str]) -> int:
    """0 if every test passed.

    Clients run some at a time, so that the server answers them in one batch. Without arguments
    the page is written after each of them, marked as partial until the last one.
    """
    pull(DEFAULT_ENCODER)
    base = pull(DEFAULT_BASE)
    statuses: list[int] = []
    missing = [f"{client} ({group})" for group, clients in CLIENTS.items() for client in clients]
    with (
        tempfile.TemporaryDirectory(prefix="loraplex-clients-") as folder,
        server_process(base, Path(folder) / "state", *_FLAGS) as server,
        ThreadPoolExecutor(_AT_ONCE) as pool,
    ):
        print(f"the server is at {server.url}", flush=True)
        results = Path(folder) / "results.jsonl"
        running = {
            pool.submit(
                _run,
                environments / group / "bin/python",
                client,
                arguments,
                {
                    "LORAPLEX_CLIENTS_URL": server.url,
                    "LORAPLEX_CLIENTS_BASE": str(base),
                    "LORAPLEX_CLIENTS_ADAPTER": str(_DEMOS / "pirate"),
                    "LORAPLEX_CLIENTS_RESULTS": str(results),
                },
            ): f"{client} ({group})"
            for group, clients in CLIENTS.items()
            for client in clients
        }
        try:
            for ended in as_completed(running):
                done = ended.result()
                print(f"{running[ended]}: {done.stdout}", flush=True)
                statuses.append(done.returncode)
                missing.remove(running[ended])
                if not arguments:
                    write_table(_PAGE, results, missing)
        finally:  # stopped: what has ended since
            if missing and not arguments and results.exists():
                write_table(_PAGE, results, missing)
        print(server.log if any(statuses) else "", end="")
    return max(statuses)


def _run(
    python: Path, client: str, arguments: list[str], server: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        **server,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else its import reads a web page
    }
    # what the clients warn about is not ours
    options = [
        "--confcutdir=tests/clients",
        "-W",
        "ignore",
        "--tb=short",
        f"--timeout={_TEST_S}",
        *arguments,
    ]
    command = [python, "-m", "pytest", f"tests/clients/test_{client}.py", *options]
    return subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
