"""Request → replica."""

from .policy import Choice, choose, rank
from .snapshot import ReplicaSnapshot, Residency

__all__ = ["Choice", "ReplicaSnapshot", "Residency", "choose", "rank"]
