"""The part that needs no Ray: snapshots from routing statistics, ranks, prompt hashes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplex_router.replicas.policy import ReplicaRouter
from loraplex_router.replicas.ray_serve import prompt_hash_of, rank_replicas

DIGEST, OTHER = "ab" * 32, "cd" * 32


@dataclass
class Replica:
    replica_id: str
    routing_stats: Mapping[str, Any] = field(default_factory=dict)
    max_ongoing_requests: int = 8


def test_a_replica_that_reports_the_adapter_comes_first() -> None:
    replicas = [
        Replica("silent"),
        Replica("holder", {"device": [DIGEST], "host": [], "free_slots": 0, "evictable": 2}),
        Replica("roomy", {"device": [], "free_slots": 3}),
    ]
    lengths = {"silent": 0, "holder": 1, "roomy": None}
    ranked = rank_replicas(ReplicaRouter(), replicas, lengths, DIGEST, 5, 0.0)
    assert [r.replica_id for r in ranked] == ["holder", "roomy", "silent"]


def test_malformed_statistics_count_as_nothing() -> None:
    odd = Replica("odd", {"device": DIGEST, "host": None, "free_slots": "many", "bytes": 3})
    good = Replica("good", {"host": [DIGEST]})
    assert rank_replicas(ReplicaRouter(), [odd, good], {}, DIGEST, 5, 0.0)[0] is good


def test_a_mixture_goes_where_all_its_adapters_are() -> None:
    one = Replica("one", {"device": [DIGEST], "evictable": 1})
    both = Replica("both", {"device": [DIGEST, OTHER], "bytes": {DIGEST: 5, OTHER: "x"}})
    mixture = f"{DIGEST},{OTHER}"
    assert rank_replicas(ReplicaRouter(), [one, both], {}, mixture, 5, 0.0)[0] is both


def test_load_is_measured_in_the_rows_that_a_replica_reports() -> None:
    """A replica takes many requests and queues them itself: 20 on 8 rows are not to be waited for
    to spare another an eviction, 20 of 500 would be."""
    stats = {"device": [DIGEST], "capacity": 8}
    lengths = {"holder": 20, "idle": 0}
    for known, first in ((stats, "idle"), ({"device": [DIGEST]}, "holder")):
        holder = Replica("holder", known, max_ongoing_requests=500)
        idle = Replica("idle", {**known, "device": [], "evictable": 1}, max_ongoing_requests=500)
        ranked = rank_replicas(ReplicaRouter(), [holder, idle], lengths, DIGEST, 5, 0.0)
        assert ranked[0].replica_id == first


def test_prompts_that_share_their_start_share_their_hash() -> None:
    start = "You are a helpful assistant. " * 20
    first = prompt_hash_of(({"prompt": start + "one"},), {})
    assert first == prompt_hash_of((), {"body": start + "two"})
    assert first != prompt_hash_of(("other",), {})
    assert prompt_hash_of((1, None), {"x": 2}) == 0


def test_a_queue_length_that_nobody_knows_is_what_the_replica_reported() -> None:
    """Ray forgets a length after ten seconds; the replica's own count is a second old."""
    busy = Replica("busy", {"device": [DIGEST], "free_slots": 1, "pending": 8})
    idle = Replica("idle", {"free_slots": 1, "pending": 0})
    for lengths, first in (({}, "idle"), ({"busy": 0}, "busy")):
        ranked = rank_replicas(ReplicaRouter(), [busy, idle], lengths, DIGEST, 5, 0.0)
        assert ranked[0].replica_id == first
