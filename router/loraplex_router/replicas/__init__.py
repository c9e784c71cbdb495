"""Request → replica."""

from .policy import Choice, choose, rank
from .snapshot import AdapterLocation, ReplicaSnapshot

__all__ = ["AdapterLocation", "Choice", "ReplicaSnapshot", "choose", "rank"]
