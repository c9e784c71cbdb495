"""Starts and controls the processes of the other ranks, and detects their failure. Runs on rank 0.

If a process is gone or a step fails on rank 0, the ranks may be out of step. Then every call
raises, so the engine fails its requests and stops.
"""

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex_adapter_store.contents.plan_file import pack_plan
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.engine.adapters.adapter_loader import OtherPools
from loraplex_server.engine.adapters.adapter_packer import AdapterPacker
from loraplex_server.engine.adapters.plan_tensors import copied
from loraplex_server.engine.errors import RankLost
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.model.errors import ModelError
from loraplex_server.model.layers.collective import Collective
from loraplex_server.model.layers.forward_context import ForwardContext
from loraplex_server.model.layers.tensor_parallel import ShardLayout

from .channel import Channel, ChannelClosed
from .plan_cut import cut_plan
from .step_tensors import join, step_tensors

_log = logging.getLogger(__name__)

_MODULE = "loraplex_server.engine.parallel.shard_worker"
_END_S = 10.0  # grace period of a process


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The settings that all ranks share, as JSON values."""

    path: str
    model_id: str
    size: int
    dtype: str  # such as "bfloat16"
    quantization: WeightFormat | None  # of a plain checkpoint
    devices: tuple[str, ...]  # by rank
    kernels: str
    n_threads: int


@dataclass(frozen=True, slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    steps: Channel  # engine thread
    loads: Channel  # loader thread


class ShardWorkers(OtherPools):
    """The other ranks, as the model (``OtherRanks``) and the pool (``OtherPools``) see them."""

    def __init__(self, settings: WorkerSettings, layout: ShardLayout) -> None:
        """Starts the processes, which begin to load the base. The caller must call ``close``."""
        self._settings, self._layout = settings, layout
        self._folder = Path(tempfile.mkdtemp(prefix="loraplex-ranks-"))
        self._life, self._life_end = os.pipe()  # closes with this process
        self._workers: list[_Worker] = []
        self._watchers: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards the next two
        self._lost: str | None = None
        self._on_lost: Callable[[str], object] = _ignore
        self._is_closing = False
        self._collective: Collective | None = None
        self._packer: AdapterPacker | None = None
        self._n_forgotten = 0
        try:
            for rank in range(1, settings.size):
                self._workers.append(self._start(rank))
        except BaseException:
            self.close()
            raise

    def join(self) -> Collective:
        """Wait until every rank has loaded, and return the group of all ranks.

        Raises ModelError with a rank's reason if it cannot load.
        """
        for worker in self._workers:
            try:
                frame = worker.steps.receive()
            except ChannelClosed as error:
                raise ModelError(
                    f"the process of rank {worker.rank} ended while it loaded the base; the log "
                    "above says why"
                ) from error
            if frame.kind == "failed":
                raise ModelError(str(frame.fields["message"]))
        for worker in self._workers:
            self._watch(worker)
        self._send_all("join")
        size, device = self._settings.size, torch.device(self._settings.devices[0])
        self._collective = Collective(self._meeting, 0, size, device)
        return self._collective

    def when_lost(self, call: Callable[[str], object]) -> None:
        """Sets the function to call, once and on any thread, when a rank is lost."""
        with self._lock:
            self._on_lost = call
            lost = self._lost
        if lost is not None:
            call(lost)

    def pack_with(self, packer: AdapterPacker) -> None:
        """Sets the packer for the adapters that are passed to ``load``."""
        self._packer = packer

    def check(self) -> None:
        """See ``OtherRanks``. Aborted calls of NCCL leave arbitrary sums on the device."""
        if self._lost is not None:
            raise RankLost(self._lost)

    def attach_kv(self, n_pages: int, page_size: int) -> None:
        """See ``OtherRanks``."""
        self._send_all("kv", {"n_pages": n_pages, "page_size": page_size})

    def write_prefix(self, slots: Tensor, whole: Tensor) -> None:
        """See ``OtherRanks``."""
        with self._in_step("prefix", {"n_tokens": slots.shape[0]}) as collective:
            collective.broadcast(slots)
            collective.broadcast(whole)

    @contextlib.contextmanager
    def step(self, step: ForwardContext, embeddings: Tensor) -> Iterator[None]:
        """See ``OtherRanks``."""
        joined, layout = join(step_tensors(step))
        fields = {
            "layout": layout,
            "n_bytes": joined.numel(),
            "n_rows": embeddings.shape[0],
            "routes_projections": step.routes_projections,
        }
        with self._in_step("step", fields) as collective:
            collective.broadcast(joined)
            collective.broadcast(embeddings)
            yield

    @contextlib.contextmanager
    def head(self, x: Tensor) -> Iterator[None]:
        """See ``OtherRanks``."""
        with self._in_step("head", {"n_rows": x.shape[0]}):
            yield

    def open(self, limits: PoolLimits) -> None:
        self._send_all("pool", asdict(limits))
        for worker in self._workers:
            try:
                worker.steps.receive()
            except ChannelClosed as error:
                raise RankLost(f"rank {worker.rank} has no place for adapters") from error

    def load(self, plan: AdapterPlan, first_slot: int) -> Callable[[], None]:
        after = self._n_forgotten
        return lambda: self._load(plan, first_slot, after)

    def publish(self, digest: str) -> None:
        self._send_all("publish", {"digest": digest})

    def forget(self, digest: str) -> None:
        self._n_forgotten += 1
        with contextlib.suppress(RankLost):  # the next step raises it
            self._send_all("forget", {"digest": digest})

    def close(self) -> None:
        """Ends the processes, by force after a grace period. The engine has stopped before."""
        self._is_closing = True
        for worker in self._workers:
            with contextlib.suppress(ChannelClosed):
                worker.steps.send("stop", {})
        os.close(self._life_end)  # loading and waiting processes end now
        for worker in self._workers:
            try:
                worker.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.steps.close()
            worker.loads.close()
        for watcher in self._watchers:
            watcher.join()
        os.close(self._life)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _meeting(self) -> Path:
        return self._folder / "meeting"

    def _start(self, rank: int) -> _Worker:
        pairs = [socket.socketpair(), socket.socketpair()]
        theirs = [theirs for _, theirs in pairs]
        passed = [end.fileno() for end in theirs] + [self._life]
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *map(str, passed)],
            stdin=subprocess.DEVNULL,
            pass_fds=passed,
            process_group=0,  # Ctrl-C reaches only rank 0, which ends the others later
        )
        for end in theirs:
            end.close()
        worker = _Worker(rank, process, *(Channel(ours) for ours, _ in pairs))
        with contextlib.suppress(ChannelClosed):  # ``join`` reports it
            fields = {**asdict(self._settings), "rank": rank, "meeting": str(self._meeting)}
            worker.steps.send("load", fields)
        return worker

    def _watch(self, worker: _Worker) -> None:
        def wait() -> None:
            status = worker.process.wait()
            if not self._is_closing:
                self._lose(f"the process of rank {worker.rank} ended with status {status}")

        watcher = threading.Thread(target=wait, name=f"loraplex-rank-{worker.rank}", daemon=True)
        watcher.start()
        self._watchers.append(watcher)

    def _lose(self, why: str) -> None:
        """Kills all ranks and reports the loss, at the first call. Any thread."""
        with self._lock:
            is_first, call = self._lost is None, self._on_lost
            self._lost = self._lost or why
        if not is_first:
            return
        _log.error("%s; the engine cannot go on without it", why)
        for worker in self._workers:
            worker.process.kill()  # it may wait for other ranks
            worker.steps.wake()
            worker.loads.wake()
        if self._collective is not None:
            self._collective.abort()
        call(why)

    @contextlib.contextmanager
    def _in_step(self, kind: str, fields: Mapping[str, Any]) -> Iterator[Collective]:
        """Starts a common operation. Any error within loses the ranks, which may be out of step."""
        if self._collective is None:
            raise RuntimeError("the ranks have not joined")
        self._send_all(kind, fields)
        try:
            yield self._collective
        except BaseException as error:
            self._lose(f"a step broke off on rank 0: {error}")
            raise RankLost(f"a step broke off: {error}") from error

    def _send_all(self, kind: str, fields: Mapping[str, Any] | None = None) -> None:
        """Sends a frame to every rank. Raises RankLost."""
        self.check()
        for worker in self._workers:
            try:
                worker.steps.send(kind, fields or {})
            except ChannelClosed as error:
                self._lose(f"the process of rank {worker.rank} does not answer")
                raise RankLost(f"rank {worker.rank} is gone") from error

    def _load(self, plan: AdapterPlan, first_slot: int, after: int) -> None:
        """Loads an adapter on every rank. Raises RuntimeError with the errors. Loader thread."""
        parts = list(self._parts(plan))  # complete before sending: all ranks get it, or none
        for worker, (fields, tensors) in zip(self._workers, parts, strict=True):
            worker.loads.send("load", {**fields, "first": first_slot, "after": after}, tensors)
        errors: list[str] = []
        for worker in self._workers:
            answer = worker.loads.receive().fields
            if answer["digest"] != plan.digest:
                self._lose(f"rank {worker.rank} answered for another adapter than was sent")
            if answer["error"] is not None:
                errors.append(f"rank {worker.rank}: {answer['error']}")
        if errors:
            raise RuntimeError("; ".join(errors))

    def _parts(self, plan: AdapterPlan) -> Iterator[tuple[dict[str, Any], Sequence[Tensor]]]:
        """Yield each rank's part of the plan: its packed factors and its other tensors."""
        packer, layout = self._packer, self._layout
        assert packer is not None
        packed = packer.pack(plan)
        rest = replace(plan, packed_adapter=None)
        for worker in self._workers:
            own = packed.of_rank(worker.rank)
            header, tensors = own.dump()
            chunks = b"".join(pack_plan(copied(cut_plan(rest, layout, worker.rank))).chunks)
            fields = {"digest": plan.digest, "header": header}
            yield fields, [torch.frombuffer(bytearray(chunks), dtype=torch.uint8), *tensors]


def _ignore(_why: str) -> None: ...
