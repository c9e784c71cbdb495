"""Request → adapter."""

from .auto_router import (
    MAX_QUERY_CHARS,
    AdapterFilter,
    AdapterProfile,
    AutoRouter,
    Candidate,
    Decision,
)
from .classifier import Calibration
from .encoder import CachedEncoder, Encoder

__all__ = [
    "MAX_QUERY_CHARS",
    "AdapterFilter",
    "AdapterProfile",
    "AutoRouter",
    "CachedEncoder",
    "Calibration",
    "Candidate",
    "Decision",
    "Encoder",
]
