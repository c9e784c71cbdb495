"""Errors of getting, finding and replacing models.

ModelError
├── ModelNotPulledError   the model is not on this machine yet: `loraplex pull`
├── PullError             the model cannot be fetched, checked or converted
└── UnsupportedBase       the model cannot be served, or would answer differently from transformers
"""


class ModelError(Exception):
    """Base of all errors about model files."""


class ModelNotPulledError(ModelError):
    pass


class PullError(ModelError):
    pass


class UnsupportedBase(ModelError):
    pass
