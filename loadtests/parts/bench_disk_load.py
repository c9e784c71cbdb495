"""Times loads from disk on the loader's thread, with and without a packed file.

    python -m loadtests.parts.bench_disk_load [--n-adapters 6] [--rounds 5]

Rank-16 adapters on all linears of the default base, one thread, files in the page cache. Prints
the medians in milliseconds as JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loadtests.provenance import commit, machine
from loadtests.random_adapters import write_adapters
from loadtests.scenario import AdapterSet
from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from loraplex_server.engine.adapters.device_pool import DevicePool
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.model.base_model import load_base_model
from loraplex_server.model.loading.pull import DEFAULT_BASE, resolve_model

RANK = 16
_CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--n-adapters", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "machine": machine(),
        "commit": commit(),
        **measure(resolve_model(), options.n_adapters, options.rounds),
    }
    print(json.dumps(result, indent=1))


def measure(path: Path, n_adapters: int, n_rounds: int) -> dict[str, float]:
    """Measure. ``path``: directory of the base."""
    model = load_base_model(path, DEFAULT_BASE, dtype=torch.bfloat16, device=_CPU)
    # No adapter is loaded into this pool: it only provides the packer.
    pool = DevicePool(model, PoolLimits(64 << 20, n_slots=1), on_loaded=lambda: None)
    kept: list[float] = []
    anew: list[float] = []
    with tempfile.TemporaryDirectory(prefix="loraplex-bench-") as folder:
        adapters = AdapterSet(lora=n_adapters, ranks=(RANK,))
        written = list(write_adapters(path, adapters, Path(folder) / "adapters", seed=1))
        names = [adapter.name for adapter in written]
        root = Path(folder) / "store"
        with AdapterStore(root, model.spec, engine=EngineHooks(packer=pool.packer)) as store:
            for adapter in written:
                store.put_directory(adapter.name, adapter)
        for _ in range(n_rounds):
            kept += _loads(root, pool, model.spec, names)
            packed = list((root / "packed").glob("*/*"))
            if len(packed) != n_adapters:
                raise RuntimeError(f"{len(packed)} packed files for {n_adapters} adapters")
            for file in packed:
                file.unlink()
            # These pack anew, and keep the files for the next round.
            anew += _loads(root, pool, model.spec, names)
    pool.close()
    return {
        "kept_file_ms": round(1000 * median(kept), 2),
        "plan_read_and_packed_ms": round(1000 * median(anew), 2),
    }


def _loads(root: Path, pool: DevicePool, base: BaseSpec, names: list[str]) -> list[float]:
    """Return the seconds of each load, in a store with nothing in memory."""
    took = []
    with AdapterStore(root, base, engine=EngineHooks(packer=pool.packer)) as store:
        for name in names:
            began = time.perf_counter()
            lease = store.acquire(name)
            took.append(time.perf_counter() - began)
            lease.release()
    return took


if __name__ == "__main__":
    main()
