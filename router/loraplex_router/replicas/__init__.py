"""Request → replica."""

from .policy import choose, rank
from .router import ReplicaRouter
from .snapshot import AdapterLocation, ReplicaSnapshot

__all__ = ["AdapterLocation", "ReplicaRouter", "ReplicaSnapshot", "choose", "rank"]
