"""The process of one rank beyond 0: loads its part of the base and does what rank 0 says.

main thread     steps, logits, publishing and forgetting adapters, in the order of rank 0
loader thread   copies adapters meanwhile
watcher         ends the process with the server, whatever it is doing
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
from pathlib import Path
from typing import Any

import torch

from loraplex_adapter_store.plan_file import parse_plan
from loraplex_kernels.cpu import native
from loraplex_kernels.model_ops import write_kv
from loraplex_kernels.quantized_weight import WeightFormat
from loraplex_server.engine.device import use_device
from loraplex_server.engine.pool_binding import bind_pool
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.errors import ModelError
from loraplex_server.model.gathered_head import GatheredHead
from loraplex_server.model.shard_loader import Checkpoint
from loraplex_server.model.tensor_parallel import Shard

from .channel import Channel, ChannelClosed
from .collective import ProcessCollective
from .shard_pool import ShardPool
from .step_tensors import bind_tensors, n_joined, split

__all__ = ["main"]

_log = logging.getLogger(__name__)


def main() -> None:
    """``argv``: file descriptors of the channels of steps and loads, and one that ends with rank 0.

    Signals of a terminal or a service manager reach rank 0, which ends this process when it is
    through with its requests.
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
    """``life`` is at its end when rank 0 has gone, by whatever death."""
    os.read(life, 1)
    os._exit(1)


def _start(steps: Channel) -> _Worker | None:
    """Loads and joins the group; None if the base cannot be served, which rank 0 is told."""
    settings = steps.receive().fields
    device = torch.device(settings["device"])
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
    collective = ProcessCollective(Path(settings["meeting"]), rank, size, device)
    shard = Shard(checkpoint.layout, rank, collective)
    return _Worker(BaseModel(model, settings["model_id"], self_check=False, shard=shard), shard)


class _Worker:
    """Owner of the rank's model and memories. Main thread, but for ``pool.load``."""

    def __init__(self, model: BaseModel, shard: Shard) -> None:
        self._model, self._shard = model, shard
        self._pool: ShardPool | None = None

    def run(self, steps: Channel) -> None:
        """Until rank 0 says stop or closes the channel; raises what a step raises."""
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
                    self._pool = ShardPool(self._model, **fields)
                    bind_pool(self._model.groups.values(), self._pool.pool)
                    steps.send("ready", {})
                case other:
                    raise RuntimeError(f"rank 0 sent {other!r}")

    @property
    def pool(self) -> ShardPool:
        """There once rank 0 has made its own."""
        if self._pool is None:
            raise RuntimeError("there is no adapter pool yet")
        return self._pool

    @torch.inference_mode()
    def _step(self, fields: Mapping[str, Any]) -> None:
        model, collective = self._model, self._shard.collective
        places = fields["places"]
        joined = torch.empty(n_joined(places), dtype=torch.uint8, device=model.device)
        collective.broadcast(joined)
        bind_tensors(model.step, split(joined, places))
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
        for layer in model.layers:  # gives back what it had
            layer.keys = layer.values = None
        model.attach_kv(model.new_kv(n_pages, page_size), model.new_kv(n_pages, page_size))


def _load_all(worker: _Worker, loads: Channel) -> None:
    """Loader thread: one adapter after the other; a failure is the adapter's alone."""
    with contextlib.suppress(ChannelClosed):
        while True:
            frame = loads.receive()
            use_device(worker.pool.pool.device)
            fields, (plan, *tensors) = frame.fields, frame.tensors
            answer = None
            try:
                packed = worker.pool.restore(fields["header"], tensors)
                place = {"first": fields["first"], "after": fields["after"]}
                worker.pool.load(parse_plan(plan), packed, **place)
            except Exception as error:
                _log.exception("the load of adapter %s failed on this rank", fields["digest"][:12])
                answer = str(error)
            loads.send("loaded", {"digest": fields["digest"], "error": answer})


if __name__ == "__main__":
    main()
