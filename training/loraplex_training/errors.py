"""Errors of training.

TrainingError
├── ExamplesError      the data cannot be read or yields nothing to learn; names the line
└── CheckpointError    a checkpoint belongs to another run, or the output exists already
"""


class TrainingError(Exception):
    """Base of all errors raised by training."""


class ExamplesError(TrainingError):
    pass


class CheckpointError(TrainingError):
    pass
