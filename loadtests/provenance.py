"""Names the machine and the commit that the numbers of a report come from."""

import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def stamped(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result behind the time, the machine and the commit that it comes from."""
    time = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"began": time, "machine": machine(), "commit": commit(), **result}


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    return {"cpu": name, "cores": os.cpu_count(), "system": platform.system()}


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    here = Path(__file__).parent
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
