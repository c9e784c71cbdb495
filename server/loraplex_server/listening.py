"""The server's socket, bound before the slow part of the start."""

import resource
import socket

from .settings.config import ConfigError, HttpConfig


def bind(config: HttpConfig) -> socket.socket:
    """Return a bound socket that does not listen yet: clients are refused during the start."""
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


def allow_open_files(n: int) -> None:
    """Raise the limit of open files to ``n``, or as far as this process may raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def reachable_url(host: str, port: int) -> str:
    """Return the URL by which this machine reaches a server on ``host``."""
    any_address = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # nosec B104
    host = host.strip("[]")
    host = any_address.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{host}:{port}"
