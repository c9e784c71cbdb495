"""Loraplex on Ray Serve: gateways with the HTTP application, replicas with one engine each.

    client ── Ray's proxy ── gateway ── router (adapter, load) ── engine replica
                             keys, templates, tokens                a step for many adapters
                             name → digest, once                    contents by digest
                                └── coordinator: files, batches, jobs, learning, counts of keys

``loraplex cluster up`` starts a cluster, on a running Ray also
``serve run loraplex_server.cluster:app config=cluster.yaml``. See docs/scale-out.md.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["app"]


def app(arguments: Mapping[str, str]) -> Any:  # ray.serve.Application: Ray is imported on use
    """Return the application for ``serve run``; ``config`` is the path of a cluster.yaml."""
    from pathlib import Path

    from .application import build_application
    from .config import read_config

    config = arguments.get("config")
    return build_application(read_config(None if config is None else Path(config)))
