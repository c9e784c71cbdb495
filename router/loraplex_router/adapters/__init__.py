"""Request → adapter."""

from .auto_router import AdapterProfile, Among, AutoRouter, Candidate, Decision
from .classifier import Calibration
from .encoder import CachedEncoder, Encoder

__all__ = [
    "AdapterProfile",
    "Among",
    "AutoRouter",
    "CachedEncoder",
    "Calibration",
    "Candidate",
    "Decision",
    "Encoder",
]
