"""Request → adapter."""

from .auto_router import AdapterFilter, AdapterProfile, AutoRouter, Candidate, Decision
from .classifier import Calibration
from .encoder import CachedEncoder, Encoder

__all__ = [
    "AdapterFilter",
    "AdapterProfile",
    "AutoRouter",
    "CachedEncoder",
    "Calibration",
    "Candidate",
    "Decision",
    "Encoder",
]
