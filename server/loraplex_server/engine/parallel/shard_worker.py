"""The process of a rank beyond 0, which loads its part of the base and follows rank 0.

main thread     steps, logits, publishing and forgetting adapters, in the order of rank 0
loader thread   copies adapters
watcher         ends the process when the server ends
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraplex_adapter_store.contents.plan_file import parse_plan
from loraplex_adapter_store.plan import AdapterPlan
from loraplex_kernels.cpu import native
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_kernels.layers.model_ops import write_kv
from loraplex_router.experts.expansion import PlacedExperts, RoutedRows
from loraplex_server.engine.adapters.adapter_memory import AdapterMemory, new_pool
from loraplex_server.engine.adapters.adapter_packer import AdapterPacker, PackedAdapter
from loraplex_server.engine.adapters.capabilities import EngineCapabilities
from loraplex_server.engine.memory.copy_stream import CopyStream
from loraplex_server.engine.memory.device import use_device
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.errors import ModelError
from loraplex_server.model.layers.collective import Collective
from loraplex_server.model.layers.forward_context import FallbackRows, ForwardContext
from loraplex_server.model.layers.routed import rows_for
from loraplex_server.model.layers.tensor_parallel import GatheredHead, Shard
from loraplex_server.model.loading.shard_loader import Checkpoint

from .channel import Channel, ChannelClosed
from .step_tensors import bind_tensors, split

_log = logging.getLogger(__name__)


def main() -> None:
    """Runs the rank. ``argv`` has three file descriptors: the channels of steps and of loads, and a
    pipe that closes with rank 0.

    Ignores SIGINT and SIGTERM: rank 0 ends this process once its requests are done.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    steps, loads = (Channel(socket.socket(fileno=int(fd))) for fd in sys.argv[1:3])
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    with contextlib.suppress(ChannelClosed):
        worker = _start(steps)
        if worker is not None:
            threading.Thread(target=_load_all, args=(worker, loads), daemon=True).start()
            worker.run(steps)


def _end_with(life: int) -> None:
    """Ends this process when the pipe ``life`` closes, however rank 0 died."""
    os.read(life, 1)
    os._exit(1)


def _start(steps: Channel) -> _Worker | None:
    """Load and join the group. Reports to rank 0 and returns None if the base is refused."""
    settings = steps.receive().fields
    device = torch.device(settings["devices"][settings["rank"]])
    use_device(device)
    torch.set_num_threads(settings["n_threads"])
    if settings["kernels"] == "reference":
        native.use_references()
    rank, size = settings["rank"], settings["size"]
    try:
        quantization = settings["quantization"]
        checkpoint = Checkpoint(
            Path(settings["path"]),
            size,
            None if quantization is None else WeightFormat(quantization),
        )
        dtype = getattr(torch, settings["dtype"])
        model = checkpoint.load(rank, dtype=dtype, device=device)
    except ModelError as error:
        steps.send("failed", {"message": str(error)})
        return None
    steps.send("loaded", {})
    steps.receive()  # all have loaded
    collective = Collective(Path(settings["meeting"]), rank, size, device)
    shard = Shard(checkpoint.layout, rank, collective)
    return _Worker(BaseModel(model, settings["model_id"], self_check=False, shard=shard), shard)


class _Worker:
    """Owner of the rank's model and memory. Main thread, except for ``pool.load``."""

    def __init__(self, model: BaseModel, shard: Shard) -> None:
        self._model, self._shard = model, shard
        self._pool: ShardPool | None = None

    def run(self, steps: Channel) -> None:
        """Handles frames until rank 0 sends "stop". Raises ChannelClosed and errors of steps."""
        while (frame := steps.receive()).kind != "stop":
            fields = frame.fields
            match frame.kind:
                case "step":
                    self._step(fields)
                case "head":
                    self._head(fields["n_rows"])
                case "prefix":
                    self._write_prefix(fields["n_tokens"])
                case "publish":
                    self.pool.publish(fields["digest"])
                case "forget":
                    self.pool.forget(fields["digest"])
                case "kv":
                    self._attach_kv(**fields)
                case "pool":
                    self._pool = ShardPool(self._model, PoolLimits(**fields))
                    self._model.attach_pool(self._pool.pool)
                    steps.send("ready", {})
                case other:
                    raise RuntimeError(f"rank 0 sent {other!r}")

    @property
    def pool(self) -> ShardPool:
        """The adapter pool. Raises RuntimeError before rank 0 has created its own."""
        if self._pool is None:
            raise RuntimeError("there is no adapter pool yet")
        return self._pool

    @torch.inference_mode()
    def _step(self, fields: Mapping[str, Any]) -> None:
        model, collective = self._model, self._shard.collective
        layout = fields["layout"]
        joined = torch.empty(fields["n_bytes"], dtype=torch.uint8, device=model.device)
        collective.broadcast(joined)
        bind_tensors(model.step, split(joined, layout))
        if self._pool is not None:
            self._pool.bind_rows(model.step)
        model.step.routes_projections = fields["routes_projections"]
        shape = fields["n_rows"], model.spec.hidden_size
        embeddings = torch.empty(shape, dtype=model.dtype, device=model.device)
        collective.broadcast(embeddings)
        model.forward(embeddings)

    @torch.inference_mode()
    def _head(self, n_rows: int) -> None:
        model = self._model
        assert isinstance(model.head.packed, GatheredHead)
        shape = n_rows, model.spec.hidden_size
        model.head.packed.compute(torch.empty(shape, dtype=model.dtype, device=model.device))

    @torch.inference_mode()
    def _write_prefix(self, n_tokens: int) -> None:
        model, layout = self._model, self._shard.layout
        slots = torch.empty(n_tokens, dtype=torch.int64, device=model.device)
        shape = 2, len(model.layers), n_tokens, layout.n_kv_heads, layout.head_dim
        whole = torch.empty(shape, dtype=model.dtype, device=model.device)
        self._shard.collective.broadcast(slots)
        self._shard.collective.broadcast(whole)
        own = whole[:, :, :, layout.kv_heads(self._shard.rank)]
        for layer, k, v in zip(model.layers, *own, strict=True):
            assert layer.keys is not None
            assert layer.values is not None
            write_kv(k.contiguous(), v.contiguous(), layer.keys, layer.values, slots)

    def _attach_kv(self, n_pages: int, page_size: int) -> None:
        model = self._model
        for layer in model.layers:  # frees the old cache
            layer.keys = layer.values = None
        model.attach_kv(model.new_kv(n_pages, page_size), model.new_kv(n_pages, page_size))


def _load_all(worker: _Worker, loads: Channel) -> None:
    """Loads adapters one by one. A failure affects only its adapter. Loader thread."""
    with contextlib.suppress(ChannelClosed):
        while True:
            frame = loads.receive()
            use_device(worker.pool.pool.device)
            fields, (plan, *tensors) = frame.fields, frame.tensors
            error_text = None
            try:
                packed = worker.pool.restore(fields["header"], tensors)
                first, after = fields["first"], fields["after"]
                worker.pool.load(parse_plan(plan), packed, first=first, after=after)
            except Exception as error:
                _log.exception("the load of adapter %s failed on this rank", fields["digest"][:12])
                error_text = str(error)
            loads.send("loaded", {"digest": fields["digest"], "error": error_text})


@dataclass(slots=True)
class _Loaded:
    memory: AdapterMemory
    experts: Mapping[str, PlacedExperts] = field(default_factory=dict)
    is_published: bool = False


class ShardPool:
    """Owner of this rank's adapter memory, which follows rank 0's ``DevicePool``.

    The main thread publishes and forgets adapters, in order with the steps. The loader thread fills
    them. A load waits until adapters that rank 0 forgot before it have freed their memory.
    """

    def __init__(self, model: BaseModel, limits: PoolLimits) -> None:
        self.pool = new_pool(model, limits, exponent_coding=False)
        self._model = model
        self._packer = AdapterPacker(model.groups, self.pool, EngineCapabilities.of_model(model))
        self._copies = CopyStream(model.device)
        self._changed = threading.Condition()  # guards all that follows, and the pool's allocator
        self._loaded: dict[str, _Loaded] = {}
        self._n_forgotten = 0

    def load(self, plan: AdapterPlan, packed: PackedAdapter, *, first: int, after: int) -> None:
        """Loads an adapter. Loader thread.

        ``first``: the slot that rank 0 chose. ``after``: the number of adapters that rank 0 forgot
        before. Raises errors of the pool or the device; then nothing is reserved.
        """
        on_host = self._packer.parts(plan)
        with self._changed:
            self._changed.wait_for(lambda: self._n_forgotten >= after)
            memory = AdapterMemory.reserve(self.pool, packed, on_host, first=first)
            loaded = self._loaded[plan.digest] = _Loaded(memory)
            mark = self._copies.mark()
        try:
            loaded.experts = self._copies.run(mark, lambda: memory.copy(on_host, plan, self._model))
        except BaseException:
            with self._changed:
                self._loaded.pop(plan.digest).memory.free()
            raise

    def publish(self, digest: str) -> None:
        """Lets rows use the adapter from the next step on. Main thread."""
        with self._changed:
            loaded = self._loaded[digest]
            loaded.memory.publish()
            loaded.is_published = True

    def forget(self, digest: str) -> None:
        """Frees the adapter, if its load succeeded. Main thread."""
        with self._changed:
            loaded = self._loaded.pop(digest, None)
            if loaded is not None:
                loaded.memory.free()
            self._n_forgotten += 1
            self._changed.notify_all()

    def bind_rows(self, step: ForwardContext) -> None:
        """Binds the adapters' parts beyond the pool to the rows in ``step.own_rows``."""
        fallback: list[FallbackRows] = []
        routed: dict[str, tuple[RoutedRows, ...]] = {}
        for digest, rows in step.own_rows.items():
            loaded = self._loaded[digest]
            if not loaded.is_published:  # the base would answer
                raise RuntimeError(f"adapter {digest[:12]} has rows before it is resident")
            parts = loaded.memory.parts.fallback
            if not parts.is_empty:
                fallback.append(FallbackRows(rows, parts))
            for site, part in rows_for(loaded.experts, rows).items() if loaded.experts else ():
                routed[site] = (*routed.get(site, ()), part)
        step.fallback, step.routed = tuple(fallback), routed

    def restore(self, header: int, tensors: list[Tensor]) -> PackedAdapter:
        """Restore what rank 0's packer dumped for this rank."""
        return self._packer.restore(header, tensors)


if __name__ == "__main__":
    main()
