"""The server's socket, bound before the slow part of the start."""

from __future__ import annotations

import socket

from .settings import ConfigError, HttpConfig

__all__ = ["bind", "reachable_url"]


def bind(config: HttpConfig) -> socket.socket:
    """A bound socket that does not listen yet, so clients are refused until the model is there."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((config.host.strip("[]"), config.port))
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror}; choose another --port"
        ) from error
    return bound


def reachable_url(host: str, port: int) -> str:
    """Where this machine reaches a server that listens on ``host``."""
    any_address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # nosec B104
    host = host.strip("[]")
    host = any_address.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"
