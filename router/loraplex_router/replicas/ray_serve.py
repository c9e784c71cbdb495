"""The replica policy as a request router of Ray Serve. Ray is imported on first use.

    from ray.serve.config import RequestRouterConfig

    RequestRouterConfig(
        request_router_class="loraplex_router.replicas.ray_serve:AdapterRequestRouter",
        request_routing_stats_period_s=1.0,
    )

A replica reports its adapters by a method ``record_routing_stats()`` that returns
``{"device": [digest, …], "host": [digest, …], "free_slots": n, "evictable": n}``, and optionally
``"capacity": rows of a step, "pending": n, "free_bytes": n, "bytes": {digest: n},
"pending_ranks": n`` (see `ReplicaSnapshot`). The default capacity is ``max_ongoing_requests``.
The caller names the adapter by ``handle.options(multiplexed_model_id=digest)``, with a mixture's
digests joined by commas, and without it for the base. Use a second handle for frequent broadcasts:
a broadcast renews the age of the queue lengths that the router believes.
"""

import time
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from .policy import UNKNOWN_PROMPT, ReplicaRouter
from .snapshot import ReplicaSnapshot

# "AdapterRequestRouter" is made on first use, by ``__getattr__`` below.

PREFIX_CHARS = 256  # prompts that share so many go to the same replica


def rank_replicas(
    router: ReplicaRouter,
    candidates: Sequence[Any],  # Ray's RunningReplica
    queue_lengths: Mapping[Any, int | None],
    model_id: str,  # digests joined by commas; "" = the base
    prompt_hash: int,
    now_s: float,
) -> list[Any]:
    """Return the candidates, best first. A replica's report replaces an unknown queue length."""
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
    """Return a hash of the start of the first string among the arguments."""
    for value in (*args, *kwargs.values()):
        text = value.get("prompt") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            digest = blake2b(text[:PREFIX_CHARS].encode(), digest_size=8).digest()
            return int.from_bytes(digest, "big")
    return UNKNOWN_PROMPT


def _build_router_class() -> type:
    from ray.serve.request_router import RequestRouter

    # No FIFOMixin: it gives a replica chosen for one adapter to the oldest request.
    class AdapterRequestRouter(RequestRouter):  # type: ignore[misc]
        """Orders the replicas; Ray keeps queue lengths, retries and back-off."""

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
                # All replicas are offered. Without back-off Ray asks again at once, for ever, and
                # its loop never hears that a replica has room.
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
