"""Request → adapter."""

from .auto_router import AdapterProfile, AutoRouter, Candidate, Decision
from .classifier import Calibration
from .encoder import CachedEncoder, Encoder

__all__ = [
    "AdapterProfile",
    "AutoRouter",
    "CachedEncoder",
    "Calibration",
    "Candidate",
    "Decision",
    "Encoder",
]
