"""What ends a cluster that nobody told to end."""

from __future__ import annotations

__all__ = ["ClusterLost"]


class ClusterLost(RuntimeError):
    """Ray or the application has gone. Ray itself must not be asked for anything any more."""
