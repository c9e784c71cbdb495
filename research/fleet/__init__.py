"""A fleet of replicas, simulated: what a policy costs in loads and in time to the first token."""

from .costs import Costs, LoadCost
from .fleet import FleetShape, Result, simulate
from .traffic import TRAFFIC, Request, Workload

__all__ = [
    "TRAFFIC",
    "Costs",
    "FleetShape",
    "LoadCost",
    "Request",
    "Result",
    "Workload",
    "simulate",
]
