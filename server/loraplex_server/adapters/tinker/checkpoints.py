"""Checkpoints of training runs on disk. They outlive their sessions and the server.

checkpoints/TENANT/RUN/run.json                        the run: base, shape, metadata
                      /weights.NAME.safetensors, .json   a state, to learn further
                      /sampler_weights.NAME.json         names an adapter of the store
"""

import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file, save_file
from torch import Tensor

from loraplex_server.errors import ApiError, invalid, not_found

Kind = Literal["weights", "sampler_weights"]
_KINDS: tuple[Kind, ...] = ("weights", "sampler_weights")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_OF_TENANT = 1000
_PREFIX = "tinker://"


@dataclass(frozen=True, slots=True)
class Run:
    """A training run, as its checkpoints remember it."""

    id: str
    base: str
    rank: int
    train_attn: bool
    train_mlp: bool
    metadata: Mapping[str, object] | None = None
    used: float = 0.0  # time of the last request, in seconds since the epoch

    @property
    def folder(self) -> str:
        """The run's id as a name of a folder and of adapters."""
        return self.id.replace(":train:", "-")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    run_id: str
    kind: Kind
    name: str
    created: float  # seconds since the epoch, as ``expires``
    expires: float | None = None
    n_bytes: int = 0
    adapter: str | None = None  # stored name; None: a state, or a sampler that equals the base
    metadata: Mapping[str, str] | None = None

    @property
    def path(self) -> str:
        return f"{_PREFIX}{self.run_id}/{self.kind}/{self.name}"


def check_checkpoint_name(name: str) -> str:
    """Return ``name``. Raises ApiError (400)."""
    if not _NAME.fullmatch(name):
        raise invalid(
            f"{name[:80]!r} is no name of a checkpoint: 1 to 64 characters of A-Z a-z 0-9 . _ -, "
            "the first a letter or digit",
            "path",
        )
    return name


class Checkpoints:
    """Owner of the folder. Any thread; methods that write or read files block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._runs: dict[tuple[str, str], Run] = {}  # by tenant and id
        self._checkpoints: dict[str, dict[str, Checkpoint]] = {}  # by tenant and path
        for tenant_folder in sorted(folder.glob("*")):
            self._read(tenant_folder)
        self.sweep()

    def runs(self, tenant: str) -> list[Run]:
        return [run for (owner, _), run in list(self._runs.items()) if owner == tenant]

    def saved(self, tenant: str, run_id: str | None = None) -> list[Checkpoint]:
        """Return the tenant's checkpoints that have not expired, newest first."""
        now = time.time()
        found = [
            each
            for each in list(self._checkpoints.get(tenant, {}).values())
            if run_id in (None, each.run_id) and (each.expires is None or each.expires > now)
        ]
        return sorted(found, key=lambda each: each.created, reverse=True)

    def find(self, tenant: str, path: str) -> tuple[Run, Checkpoint]:
        """Raises ApiError (404), also for checkpoints of others and expired ones."""
        found = self._checkpoints.get(tenant, {}).get(path)
        if found is None or (found.expires or math.inf) <= time.time():
            raise not_found(f"there is no checkpoint {path[:200]!r}", "path", "unknown_checkpoint")
        return self._runs[tenant, found.run_id], found

    def n_bytes(self, tenant: str) -> int:
        return sum(each.n_bytes for each in list(self._checkpoints.get(tenant, {}).values()))

    def check_room(self, tenant: str, path: str, *, overwrite: bool) -> None:
        """Raises ApiError (403, 400) if the tenant may not save under ``path``."""
        saved = self._checkpoints.get(tenant, {})
        if path in saved and not overwrite:
            raise invalid(f"{path} exists; take another name, or set overwrite", "path", "exists")
        if path not in saved and len(saved) >= _MAX_OF_TENANT:
            raise ApiError(
                403,
                f"{len(saved)} checkpoints are kept, which is the most; delete some",
                code="quota_exceeded",
            )

    def save(
        self, tenant: str, run: Run, checkpoint: Checkpoint, state: Mapping[str, Tensor] | None
    ) -> Checkpoint:
        """Write a checkpoint, with ``state`` if it is one to learn further. Atomic."""
        self.sweep()
        folder = self._run_folder(tenant, run)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if state is not None:
                file = folder / f"weights.{checkpoint.name}.safetensors"
                save_file(dict(state), _new(file))
                _new(file).replace(file)
                checkpoint = replace(checkpoint, n_bytes=file.stat().st_size)
            _write(folder / "run.json", asdict(run))
            self._write_card(folder, checkpoint)
            self._runs[tenant, run.id] = run
            self._checkpoints.setdefault(tenant, {})[checkpoint.path] = checkpoint
        return checkpoint

    def load(self, tenant: str, path: str) -> tuple[Run, dict[str, Tensor]]:
        """Return the run of a state, and the state. Raises ApiError (400, 404)."""
        run, checkpoint = self.find(tenant, path)
        if checkpoint.kind != "weights":
            raise invalid(f"{path} is for sampling; load one that save_state wrote", "path")
        file = self._run_folder(tenant, run) / f"weights.{checkpoint.name}.safetensors"
        return run, load_file(file)

    def set_expiry(self, tenant: str, path: str, expires: float | None) -> None:
        """Raises ApiError (404)."""
        run, checkpoint = self.find(tenant, path)
        with self._lock:
            changed = replace(checkpoint, expires=expires)
            self._write_card(self._run_folder(tenant, run), changed)
            self._checkpoints[tenant][path] = changed

    def delete(self, tenant: str, checkpoint: Checkpoint) -> None:
        with self._lock:
            if self._checkpoints.get(tenant, {}).pop(checkpoint.path, None) is None:
                return
            run = self._runs[tenant, checkpoint.run_id]
            folder = self._run_folder(tenant, run)
            for ending in ("json", "safetensors"):
                file = folder / f"{checkpoint.kind}.{checkpoint.name}.{ending}"
                file.unlink(missing_ok=True)
            if not any(c.run_id == run.id for c in self._checkpoints[tenant].values()):
                del self._runs[tenant, run.id]
                (folder / "run.json").unlink(missing_ok=True)

    def sweep(self) -> None:
        """Delete the expired checkpoints. Their adapters expire in the store."""
        now = time.time()
        for tenant, saved in list(self._checkpoints.items()):
            for each in list(saved.values()):
                if each.expires is not None and each.expires <= now:
                    self.delete(tenant, each)

    def _run_folder(self, tenant: str, run: Run) -> Path:
        return self._folder / f"of-{tenant}" / run.folder

    def _write_card(self, folder: Path, checkpoint: Checkpoint) -> None:
        _write(folder / f"{checkpoint.kind}.{checkpoint.name}.json", asdict(checkpoint))

    def _read(self, tenant_folder: Path) -> None:
        tenant = tenant_folder.name.removeprefix("of-")
        for file in tenant_folder.glob("*/run.json"):
            run = Run(**json.loads(file.read_bytes()))
            self._runs[tenant, run.id] = run
            for kind in _KINDS:
                for card in file.parent.glob(f"{kind}.*.json"):
                    checkpoint = Checkpoint(**json.loads(card.read_bytes()))
                    self._checkpoints.setdefault(tenant, {})[checkpoint.path] = checkpoint


def _new(file: Path) -> Path:
    return file.with_name(f"new-{file.name}")


def _write(file: Path, value: object) -> None:
    _new(file).write_text(json.dumps(value))
    os.replace(_new(file), file)
