"""Errors of getting and finding models.

ModelError
├── ModelNotPulledError   the model is not on this machine yet: `loraplex pull`
└── PullError             the model cannot be fetched, checked or converted
"""

from __future__ import annotations

__all__ = ["ModelError", "ModelNotPulledError", "PullError"]


class ModelError(Exception):
    """Base of all errors about model files."""


class ModelNotPulledError(ModelError):
    pass


class PullError(ModelError):
    pass
