"""All processes of a cluster, as one of them asks: metrics, calls, and who holds what."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from heapq import merge
from itertools import islice
from typing import TypeVar

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from loraplex_router.experts import ExpertLoad
from loraplex_server.api.fleet import Calls
from loraplex_server.api.state import AppState, in_store_thread
from loraplex_server.faults import Degradation
from loraplex_server.metrics.call_log import N_ENDED
from loraplex_server.metrics.collector import fault_family
from loraplex_server.metrics.engine_families import names_by_digest
from loraplex_server.metrics.live_view import MAX_ROWS, percentiles
from loraplex_server.metrics.routing_collector import expert_families

from .fleet_metrics import ProcessMetrics, one_page
from .front_calls import FrontCalls, FrontSpeed
from .remote_engine import RemoteEngine
from .remote_request import ReplicaStats

__all__ = ["ClusterFleet"]

_ASK_S = 5.0
_FRONTS = ("Gateway", "Desk")  # deployments with the HTTP application
_MAX_ADAPTERS = 512  # shown of a replica
_log = logging.getLogger(__name__)
T = TypeVar("T")


class ClusterFleet:
    """See ``Fleet``. Event loop only."""

    def __init__(self, replica: str, engine: RemoteEngine) -> None:
        """``replica``: of the process that asks."""
        self._replica = replica
        self._engine = engine
        self._application = serve.get_replica_context().app_name

    async def metrics_page(self, state: AppState) -> bytes:
        fronts = await self._ask_fronts("own_metrics", ProcessMetrics)
        families, names = state.collector.engine_families, names_by_digest(state.collector.listing)
        engines = [
            ProcessMetrics(
                each.replica,
                [
                    *families(each.engine, alive=each.alive),
                    *expert_families(each.expert_loads, names),
                    fault_family(each.faults),
                ],
            )
            for each in self._engine.replicas
        ]
        return one_page([*fronts, *engines])

    @property
    def degraded(self) -> Sequence[Degradation]:
        return [part for each in self._engine.replicas for part in each.degraded]

    async def view(self, state: AppState) -> dict[str, object]:
        await in_store_thread(state, state.collector.refresh_listing)
        names = names_by_digest(state.collector.listing)
        fronts = await self._ask_fronts("own_calls", FrontCalls, None, 0)
        return {
            "name": self._application,
            "age_s": self._engine.age_s,
            "engines": [_engine(each, names) for each in self._engine.replicas],
            "fronts": [
                {
                    "replica": front.replica,
                    "role": front.role,
                    "calls": len(front.running),
                    "answers": front.replica == self._replica,
                }
                for front in fronts
            ],
        }

    async def calls(self, tenant: str | None) -> Calls:
        fronts = await self._ask_fronts("own_calls", FrontCalls, tenant, N_ENDED)
        running = merge(*(front.running for front in fronts), key=_started)
        ended = merge(*(front.ended for front in fronts), key=_ended, reverse=True)
        return Calls(list(running), list(islice(ended, N_ENDED)))

    async def live(self, seen: Mapping[str, object]) -> dict[str, object]:
        fronts = await self._ask_fronts("own_speed", FrontSpeed)
        rows = merge(*(front.running for front in fronts), key=_started)
        engines = self._engine.replicas
        adapters, n_bytes = seen["adapters"], seen["bytes"]
        assert isinstance(adapters, dict)
        assert isinstance(n_bytes, dict)
        host = {
            "used": sum(engine.host_bytes_used for engine in engines),
            "total": sum(engine.host_bytes_total for engine in engines),
        }
        return {
            **seen,
            "adapters": {**adapters, "host": sum(len(e.host_adapters) for e in engines)},
            "bytes": {**n_bytes, "host": host},
            "tokens_per_s": {
                "prompt": sum(front.prompt_tokens_per_s for front in fronts),
                "output": sum(front.output_tokens_per_s for front in fronts),
            },
            "first_token_s": percentiles(list(merge(*(f.first_token_s for f in fronts)))),
            "gap_s": percentiles(list(merge(*(f.gap_s for f in fronts)))),
            "rows": list(islice(rows, MAX_ROWS)),
        }

    async def expert_load(self, digest: str, window_s: float) -> ExpertLoad:
        found = await self._engine.ask_all("expert_load", digest, window_s)
        return ExpertLoad.joined(load for load in found if isinstance(load, ExpertLoad))

    async def unload(self, digest: str) -> int:
        return sum(await self._ask_fronts("unload", int, digest))

    async def _ask_fronts(self, method: str, kind: type[T], *arguments: object) -> list[T]:
        """What they answer; a deployment of which one does not answer in time is left out."""
        asked = [
            serve.get_deployment_handle(name, app_name=self._application)
            .broadcast(method, *arguments)
            .results_async(timeout_s=_ASK_S)
            for name in _FRONTS
        ]
        found: list[T] = []
        for answers in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answers, (RayError, RayServeException, TimeoutError)):
                _log.info("%s: a process does not answer: %s", method, answers)
            elif isinstance(answers, BaseException):
                raise answers
            else:
                found += [answer for answer in answers if isinstance(answer, kind)]
        return found


def _engine(said: ReplicaStats, names: Mapping[str, str]) -> dict[str, object]:
    stats = said.engine
    return {
        "replica": said.replica,
        "alive": said.alive,
        "running": stats.n_running,
        "waiting": stats.n_waiting,
        "rows": {"used": stats.n_running, "total": stats.max_batch_size},
        "steps": stats.n_steps,
        "step_age_s": stats.step_age_s,
        "preemptions": stats.n_preemptions,
        "kv_pages": {"used": stats.kv_pages_used, "total": stats.kv_pages_total},
        "bytes": {
            "device": {"used": stats.pool_bytes_used, "total": stats.pool_bytes_total},
            "host": {"used": said.host_bytes_used, "total": said.host_bytes_total},
        },
        "slots": stats.pool_slots_total,
        "loads": stats.n_adapter_loads,
        "evictions": stats.n_adapter_evictions,
        "adapters": _adapters(said, names),
    }


def _adapters(said: ReplicaStats, names: Mapping[str, str]) -> list[dict[str, object]]:
    """The device's, then those that are in host memory only."""
    on_device = dict.fromkeys(said.engine.resident_adapters, "device")
    tiers = on_device | {d: "host" for d in said.host_adapters if d not in on_device}
    return [
        {
            "name": names.get(digest, digest[:12]),
            "digest": digest,
            "tier": tier,
            "running": said.engine.running_adapters.get(digest, 0),
            "waiting": said.engine.waiting_adapters.get(digest, 0),
            "requests": said.adapter_requests.get(digest, 0),
        }
        for digest, tier in islice(tiers.items(), _MAX_ADAPTERS)
    ]


def _started(call: Mapping[str, object]) -> float:
    return _number(call["started"])


def _ended(call: Mapping[str, object]) -> float:
    return _number(call["started"]) + _number(call["seconds"])


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value
