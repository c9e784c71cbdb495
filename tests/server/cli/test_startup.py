"""The command answers at once: what takes seconds to import waits until it is needed."""

import subprocess
import sys


def test_the_command_imports_nothing_heavy() -> None:
    program = """
import sys, loraplex_server.cli.adapter_client, loraplex_server.cli.app
heavy = {"torch", "transformers", "fastapi", "numpy", "scipy"}
print(sorted(heavy & set(sys.modules)))
"""
    told = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == "[]"
