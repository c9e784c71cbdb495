"""Opens one pickle weights-only and writes safetensors, in a restricted process.

``convert`` starts it; the store never imports it. Prints one line of JSON.
"""

import json
import resource
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_MARGIN = 1 << 30  # beyond the mappings of torch and three copies of the file
_CPU_SECONDS = 300


def main(source: Path, target: Path, max_bytes: int) -> None:
    _lock_down(source.stat().st_size, max_bytes)
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        raise ValueError(f"the pickle holds a {type(loaded).__name__}, not a table of tensors")
    tensors: dict[str, Tensor] = {}
    dropped: list[str] = []
    for name, value in loaded.items():
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided:
            tensors[name] = value.detach().clone().contiguous()
        else:
            dropped.append(str(name)[:200])
    if not tensors:
        raise ValueError("the pickle holds no tensors")
    save_file(tensors, target)
    print(json.dumps({"tensors": sorted(tensors), "dropped": dropped}))


def _lock_down(n_bytes: int, max_bytes: int) -> None:
    """Limit memory, time, file sizes and core dumps for the rest of the process."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for kind, value in (
        (resource.RLIMIT_AS, mapped + 3 * n_bytes + _MARGIN),
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_FSIZE, max_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (value, value))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        print(json.dumps({"error": f"{type(error).__name__}: {text}"}))
        sys.exit(1)
