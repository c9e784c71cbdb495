"""Plugs the replica policy into Ray Serve's request router. Ray is imported on first use only.

    from ray.serve.config import RequestRouterConfig

    RequestRouterConfig(
        request_router_class="loraplex_router.replicas.ray_serve:AdapterRequestRouter",
        request_routing_stats_period_s=1.0,
    )

The replica reports where its adapters are by defining ``record_routing_stats()`` that returns
``{"device": [digest, …], "host": [digest, …], "free_slots": n, "evictable": n}`` and, where it
can, ``"capacity": rows of a step, "pending": n, "free_bytes": n, "bytes": {digest: n},
"pending_ranks": n`` (see `ReplicaSnapshot`). Without a capacity it is ``max_ongoing_requests``.
The caller names the adapter by ``handle.options(multiplexed_model_id=digest)``, those of a mixture
joined by commas, and leaves it unset for the base. Who broadcasts often must do it on a handle of
its own: a broadcast renews the age of the queue length that the router believes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, Protocol

from .policy import UNKNOWN_PROMPT
from .router import ReplicaRouter
from .snapshot import ReplicaSnapshot

# "AdapterRequestRouter" exists too, on first use: see the end of this file.
__all__ = ["prompt_hash_of", "rank_replicas"]

PREFIX_CHARS = 256  # what two prompts must share to be sent to the same holder


class ServeReplica(Protocol):
    """The part of Ray's ``RunningReplica`` that is read."""

    @property
    def replica_id(self) -> Any: ...
    @property
    def routing_stats(self) -> Mapping[str, Any]: ...
    @property
    def max_ongoing_requests(self) -> int: ...


def rank_replicas(
    router: ReplicaRouter,
    candidates: Sequence[ServeReplica],
    queue_lengths: Mapping[Any, int | None],
    model_id: str,  # digests joined by commas; "" = the base
    prompt_hash: int,
    now_s: float,
) -> list[ServeReplica]:
    """The candidates, best first. An unknown queue length is what the replica reported last."""
    by_name = {str(c.replica_id): c for c in candidates}
    snapshots = [
        ReplicaSnapshot.from_stats(
            name,
            c.routing_stats or {},
            n_pending=queue_lengths.get(c.replica_id),
            capacity=c.max_ongoing_requests,
        )
        for name, c in by_name.items()
    ]
    digests = tuple(digest for digest in model_id.split(",") if digest)
    ranked = router.rank(snapshots, digests, prompt_hash, now_s)
    return [by_name[snapshot.replica_id] for snapshot in ranked]


def prompt_hash_of(args: Sequence[object], kwargs: Mapping[str, object]) -> int:
    """Hash of the start of the request's text: the first string among the arguments."""
    for value in (*args, *kwargs.values()):
        text = value.get("prompt") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            digest = blake2b(text[:PREFIX_CHARS].encode(), digest_size=8).digest()
            return int.from_bytes(digest, "big")
    return UNKNOWN_PROMPT


def _build_router_class() -> type:
    from ray.serve.request_router import RequestRouter

    # No FIFOMixin: it hands a replica chosen for one adapter to whoever waits longest.
    class AdapterRequestRouter(RequestRouter):  # type: ignore[misc]
        """Ray's router with our order; Ray keeps queue lengths, retries and back-off."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._placement = ReplicaRouter()

        async def choose_replicas(
            self, candidate_replicas: list[Any], pending_request: Any = None
        ) -> list[list[Any]]:
            if not candidate_replicas:
                return []
            model_id, prompt_hash = "", UNKNOWN_PROMPT
            if pending_request is not None:
                # All replicas are offered. Without this Ray asks again at once, for ever: its loop
                # then never gets to hear that a replica has room.
                pending_request.routing_context.should_backoff = True
                model_id = pending_request.metadata.multiplexed_model_id
                prompt_hash = prompt_hash_of(pending_request.args, pending_request.kwargs)
            cache = self.replica_queue_len_cache
            lengths = {r.replica_id: cache.get(r.replica_id) for r in candidate_replicas}
            ranked = rank_replicas(
                self._placement,
                candidate_replicas,
                lengths,
                model_id,
                prompt_hash,
                time.monotonic(),
            )
            # One rank per replica: Ray goes to the next only if a replica refuses the request.
            return [[replica] for replica in ranked]

    return AdapterRequestRouter


def __getattr__(name: str) -> type:
    if name == "AdapterRequestRouter":
        return _build_router_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
