"""Functions for worker processes, well-behaved and hostile."""

import os
import sys
import threading
import time

_prepared: list[float] = []


def prepared(cpu_s: float) -> None:
    """Spend this much processor time."""
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass
    _prepared.append(cpu_s)


def n_prepared() -> int:
    return len(_prepared)


def doubled(text: str) -> str:
    print("a function may print")
    return text * 2


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def burn(n_threads: int) -> None:
    """Spend processor time in several threads, which the kernel's limit counts together."""
    for _ in range(n_threads):
        threading.Thread(target=_spin, daemon=True).start()
    _spin()


def _spin() -> None:
    while True:
        pass


def allocate(n_bytes: int) -> int:
    return len(bytearray(n_bytes))


def long(n_chars: int) -> str:
    return "a" * n_chars


def deep(n: int) -> int:
    return deep(n + 1)


def fail(text: str) -> None:
    raise LookupError(text)


def crash() -> None:
    os.abort()


def modules() -> list[str]:
    return sorted(sys.modules)


def environment() -> dict[str, str]:
    return dict(os.environ)
