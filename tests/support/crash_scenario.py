"""Kills a process before the k-th change of a scenario, in a file or in SQL, for every k.

It runs in a process of its own. The argument is the distance between one k and the next. For each k
it forks, lets the child die, reopens the store, and checks that every committed adapter is intact
and the one in flight is there wholly or not at all.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.contents.content_files import Disk
from loraplex_adapter_store.store import AdapterStore, EngineHooks
from tests.adapter_store.conftest import plain_lora
from tests.support.adapters.packers import TensorForm, TensorsAside
from tests.support.bases.tiny_models import tiny_llama

KILLED = 77
STEPS = (
    ("put", "a", 1),
    ("put", "b", 2),
    ("put", "a", 3),  # replaces: the old content goes
    ("put", "twin", 3),  # a content that is there already
    ("delete", "b", 0),
    ("delete", "a", 0),  # the twin keeps the content
)


class FatalDisk(Disk):
    """End the process before operation ``k``; a write leaves half of its bytes."""

    def __init__(self, k: int) -> None:
        self.left = k

    def before(self, operation: str, path: Path) -> None:
        if operation == "fsync":
            return  # a kill just before it leaves what a kill just after the write leaves
        self.left -= 1
        if self.left < 0:
            if operation == "write":
                with path.open("ab") as file:
                    file.write(b"torn")
            os._exit(KILLED)


def run_steps(root: Path, base: BaseSpec, disk: FatalDisk, log: int) -> None:
    store = AdapterStore(root, base, disk=disk, engine=EngineHooks(TensorsAside()))
    store.state.registry._db.execute("PRAGMA synchronous=OFF")
    changes = ("INSERT", "UPDATE", "DELETE", "COMMIT")
    store.state.registry._db.set_trace_callback(
        lambda sql: disk.before("sql", root) if sql.startswith(changes) else None
    )
    for number, (action, name, seed) in enumerate(STEPS):
        if action == "put":
            config, tensors = plain_lora(seed)
            store.put_tensors(name, config, tensors)  # type: ignore[arg-type]
        else:
            store.delete(name)
        os.write(log, bytes([number]))
    store.close()
    os._exit(0)


def names_after(n_steps: int) -> dict[str, int]:
    names: dict[str, int] = {}
    for action, name, seed in STEPS[:n_steps]:
        if action == "put":
            names[name] = seed
        elif action == "delete":
            del names[name]
    return names


def check(root: Path, base: BaseSpec, n_committed: int) -> None:
    """Open the store as the next process would, and check it. Raises AssertionError."""
    allowed = [names_after(n_committed), names_after(min(n_committed + 1, len(STEPS)))]
    with AdapterStore(root, base, engine=EngineHooks(TensorsAside())) as store:
        store.state.registry._db.execute("PRAGMA synchronous=OFF")
        # Before any load: where a form is missing, one writes it anew beside this thread.
        files = {p.name for p in (root / "contents").glob("*/*")}
        assert files == {card.digest for card in store.list()}, "orphans were not swept"
        forms = {p.name for p in (root / "packed").glob("*/*")}
        assert forms <= files, "orphaned forms were not swept"
        assert not any((root / "staging").iterdir()), "staging was not swept"
        found: dict[str, int] = {}
        for card in store.list():
            with store.acquire(card.name) as lease:
                form = lease.plan.packed_adapter
                assert isinstance(form, TensorForm)
                values = {float(v) for t in form.tensors for v in t.unique()}
            assert len(values) == 1, f"{card.name} is mixed up: {values}"
            found[card.name] = int(values.pop())
        assert found in allowed, f"found {found}, allowed {allowed}"
        config, tensors = plain_lora(9)
        store.put_tensors("after", config, tensors)  # type: ignore[arg-type]


def main(folder: Path, stride: int) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # what a killed process wrote is in the page cache anyway
    base = BaseSpec.of(tiny_llama(), "tiny-llama")
    k = 0
    while True:
        root = folder / str(k)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            run_steps(root, base, FatalDisk(k), writing)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as log:
            n_committed = len(log.read())
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, KILLED), f"the child failed by itself at k={k}: {code}"
        try:
            check(root, base, n_committed)
        except Exception as error:
            raise AssertionError(f"killed at operation {k}: {error}") from error
        shutil.rmtree(root)
        if code == 0:
            break
        k += stride
    print(json.dumps({"n_operations": k}))


def run() -> None:
    # In memory where there is such a place: what a kill leaves does not depend on the device.
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as temporary:
        main(Path(temporary), int(sys.argv[1]))
