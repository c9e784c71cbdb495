"""Rank 0's side: starts the processes of the other ranks, leads them, and sees when one dies.

Once the ranks may be out of step - a process is gone, or a step broke off on rank 0 - nothing is
computed any more: every call raises, so the engine ends its requests and is dead.
"""

from __future__ import annotations

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_adapter_store.plan_file import pack_plan
from loraplex_kernels.quantized_weight import WeightFormat
from loraplex_server.engine.adapter_packer import AdapterPacker
from loraplex_server.engine.errors import RankLost
from loraplex_server.engine.plan_tensors import copied
from loraplex_server.model.errors import ModelError
from loraplex_server.model.forward_context import ForwardContext
from loraplex_server.model.tensor_parallel import ShardLayout

from .channel import Channel, ChannelClosed
from .collective import ProcessCollective
from .plan_cut import cut_plan
from .step_tensors import join, step_tensors

__all__ = ["ShardWorkers", "WorkerSettings"]

_log = logging.getLogger(__name__)

_MODULE = "loraplex_server.engine.parallel.shard_worker"
_END_S = 10.0  # for a process to end by itself


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What every rank has in common."""

    path: Path
    model_id: str
    size: int
    dtype: torch.dtype
    quantization: WeightFormat | None  # of a checkpoint that is plain
    devices: tuple[torch.device, ...]  # by rank
    kernels: str
    n_threads: int


@dataclass(frozen=True, slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    steps: Channel  # engine thread
    loads: Channel  # loader thread


class ShardWorkers:
    """The other ranks, as the model (``OtherRanks``) and the pool (``OtherPools``) see them."""

    def __init__(self, settings: WorkerSettings) -> None:
        """Starts the processes, which load meanwhile. Close it, whatever comes next."""
        self._settings = settings
        self._folder = Path(tempfile.mkdtemp(prefix="loraplex-ranks-"))
        self._life, self._life_end = os.pipe()  # ends with this process
        self._workers: list[_Worker] = []
        self._watchers: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards the next two
        self._lost: str | None = None
        self._on_lost: Callable[[str], object] = _ignore
        self._is_closing = False
        self._collective: ProcessCollective | None = None
        self._layout: ShardLayout | None = None
        self._packer: AdapterPacker | None = None
        self._n_forgotten = 0
        try:
            for rank in range(1, settings.size):
                self._workers.append(self._start(rank))
        except BaseException:
            self.close()
            raise

    def join(self, layout: ShardLayout) -> ProcessCollective:
        """Waits until every rank has loaded its part, and makes the group of all.

        Raises ModelError with a rank's reason if it could not load.
        """
        self._layout = layout
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
        self._tell("join")
        settings = self._settings
        self._collective = ProcessCollective(self._meeting, 0, settings.size, settings.devices[0])
        return self._collective

    @property
    def layout(self) -> ShardLayout:
        """Of the base; once all have joined."""
        assert self._layout is not None
        return self._layout

    def when_lost(self, call: Callable[[str], object]) -> None:
        """``call`` hears once, on any thread, that a rank is gone; at once if it is gone by now."""
        with self._lock:
            self._on_lost = call
            lost = self._lost
        if lost is not None:
            call(lost)

    def pack_with(self, packer: AdapterPacker) -> None:
        """The packer whose adapters come to ``load``."""
        self._packer = packer

    def check(self) -> None:
        """See ``OtherRanks``. NCCL's calls return before the sums are there, and when they are
        aborted, the device goes on with whatever lies in memory."""
        if self._lost is not None:
            raise RankLost(self._lost)

    def attach_kv(self, n_pages: int, page_size: int) -> None:
        """See ``OtherRanks``."""
        self._tell("kv", {"n_pages": n_pages, "page_size": page_size})

    def write_prefix(self, slots: Tensor, whole: Tensor) -> None:
        """See ``OtherRanks``."""
        with self._in_step("prefix", {"n_tokens": slots.shape[0]}) as collective:
            collective.broadcast(slots)
            collective.broadcast(whole)

    @contextlib.contextmanager
    def step(self, step: ForwardContext, embeddings: Tensor) -> Iterator[None]:
        """See ``OtherRanks``."""
        joined, places = join(step_tensors(step))
        fields = {
            "places": places,
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

    def open(self, *, n_bytes: int, n_slots: int, max_rank: int) -> None:
        """See ``OtherPools``."""
        self._tell("pool", {"n_bytes": n_bytes, "n_slots": n_slots, "max_rank": max_rank})
        for worker in self._workers:
            try:
                worker.steps.receive()
            except ChannelClosed as error:
                raise RankLost(f"rank {worker.rank} has no place for adapters") from error

    def load(self, plan: AdapterPlan, first_slot: int) -> Callable[[], None]:
        """See ``OtherPools``."""
        after = self._n_forgotten
        return lambda: self._load(plan, first_slot, after)

    def publish(self, digest: str) -> None:
        """See ``OtherPools``."""
        self._tell("publish", {"digest": digest})

    def forget(self, digest: str) -> None:
        """See ``OtherPools``."""
        self._n_forgotten += 1
        with contextlib.suppress(RankLost):  # the next step says so
            self._tell("forget", {"digest": digest})

    def close(self) -> None:
        """Ends the processes: by a word, or after a while by force. Once the engine has stopped."""
        self._is_closing = True
        for worker in self._workers:
            with contextlib.suppress(ChannelClosed):
                worker.steps.send("stop", {})
        os.close(self._life_end)  # those that load or wait end now
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
        settings = self._settings
        pairs = [socket.socketpair(), socket.socketpair()]
        theirs = [theirs for _, theirs in pairs]
        passed = [end.fileno() for end in theirs] + [self._life]
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, *map(str, passed)],
            stdin=subprocess.DEVNULL,
            pass_fds=passed,
            process_group=0,  # Ctrl-C is for rank 0, which ends the others when it is through
        )
        for end in theirs:
            end.close()
        worker = _Worker(rank, process, *(Channel(ours) for ours, _ in pairs))
        with contextlib.suppress(ChannelClosed):  # ``join`` says so
            worker.steps.send(
                "load",
                {
                    "path": str(settings.path),
                    "model_id": settings.model_id,
                    "rank": rank,
                    "size": settings.size,
                    "dtype": str(settings.dtype).removeprefix("torch."),
                    "quantization": settings.quantization,
                    "device": str(settings.devices[rank]),
                    "kernels": settings.kernels,
                    "n_threads": settings.n_threads,
                    "meeting": str(self._meeting),
                },
            )
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
        """Any thread, more than once."""
        with self._lock:
            is_first, call = self._lost is None, self._on_lost
            self._lost = self._lost or why
        if not is_first:
            return
        _log.error("%s; the engine cannot go on without it", why)
        for worker in self._workers:
            worker.process.kill()  # it may wait for the others for ever
            worker.steps.wake()
            worker.loads.wake()
        if self._collective is not None:
            self._collective.abort()
        call(why)

    @contextlib.contextmanager
    def _in_step(self, kind: str, fields: Mapping[str, Any]) -> Iterator[ProcessCollective]:
        """Whatever goes wrong within leaves the ranks at different places."""
        if self._collective is None:
            raise RuntimeError("the ranks have not joined")
        self._tell(kind, fields)
        try:
            yield self._collective
        except BaseException as error:
            self._lose(f"a step broke off on rank 0: {error}")
            raise RankLost(f"a step broke off: {error}") from error

    def _tell(self, kind: str, fields: Mapping[str, Any] | None = None) -> None:
        """The same to every rank. Raises RankLost."""
        self.check()
        for worker in self._workers:
            try:
                worker.steps.send(kind, fields or {})
            except ChannelClosed as error:
                self._lose(f"the process of rank {worker.rank} does not answer")
                raise RankLost(f"rank {worker.rank} is gone") from error

    def _load(self, plan: AdapterPlan, first_slot: int, after: int) -> None:
        """Loader thread. Waits for every rank's answer, then raises the first error."""
        parts = list(self._parts(plan))  # before anything is sent: all ranks get it, or none
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
        """For each rank what it loads: the packed factors of its own and the rest of the plan."""
        packer, layout = self._packer, self.layout
        assert packer is not None
        packed = packer.pack(plan)
        rest = replace(plan, packed_adapter=None)
        for worker in self._workers:
            own = packed.of_rank(worker.rank)
            header, tensors = packer.dump(own)
            chunks = b"".join(pack_plan(copied(cut_plan(rest, layout, worker.rank))).chunks)
            fields = {"digest": plan.digest, "header": header}
            yield fields, [torch.frombuffer(bytearray(chunks), dtype=torch.uint8), *tensors]


def _ignore(_why: str) -> None: ...
