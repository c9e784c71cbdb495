"""Copies adapters to the device on a thread of its own."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from loraplex_adapter_store.plan import AdapterPlan
from loraplex_router.experts.expansion import PlacedExperts
from loraplex_server.engine.memory.copy_stream import CopyStream
from loraplex_server.engine.memory.device import use_device
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.model.trunk import Trunk

from .adapter_memory import AdapterMemory
from .device_parts import DeviceParts


class OtherPools:
    """The adapter pools of the other ranks, where each adapter has the same slots as on rank 0.

    This one is that of an engine with one process, and does nothing. Engine thread, except for the
    returned loads.
    """

    def open(self, limits: PoolLimits) -> None:
        """Creates a pool of this size on every rank."""

    def load(self, plan: AdapterPlan, first_slot: int) -> Callable[[], None]:
        """Return a function that loads ``plan`` on all ranks, for the loader thread.

        The function returns when all ranks have loaded it and raises if a rank cannot.
        """
        return lambda: None

    def publish(self, digest: str) -> None:
        """Lets rows use the adapter from the next step on."""

    def forget(self, digest: str) -> None:
        """Frees the adapter's memory, also after a failed load."""


class AdapterLoader:
    """Owner of the loader thread, which runs one load at a time, on all ranks."""

    def __init__(self, model: Trunk, others: OtherPools) -> None:
        self._model, self._others = model, others
        self._copies = CopyStream(model.device)
        self._thread = ThreadPoolExecutor(
            1,
            thread_name_prefix="loraplex-loader",
            initializer=use_device,
            initargs=(model.device,),
        )

    def submit(
        self, plan: AdapterPlan, memory: AdapterMemory, on_host: DeviceParts
    ) -> Future[Mapping[str, PlacedExperts]]:
        """Starts the load and returns the future of its experts. Engine thread."""
        mark = self._copies.mark()
        load_on_others = self._others.load(plan, memory.slots[0])

        def load() -> Mapping[str, PlacedExperts]:
            experts = self._copies.run(mark, lambda: memory.copy(on_host, plan, self._model))
            load_on_others()
            return experts

        return self._thread.submit(load)

    def close(self) -> None:
        """Waits for the running load and cancels the others."""
        self._thread.shutdown(wait=True, cancel_futures=True)
