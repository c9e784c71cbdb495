"""The main program of a worker process: reads calls and answers them, under limits that it sets.

A frame is four bytes of length and JSON. A call is ``[function, args, cpu_s]`` with a function as
``module:name``; an answer is ``["value", result]``, ``["raised", type, text]`` or
``["too large", text]``. Imports little, so that a process starts fast; see `pool`.
"""

import importlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import BinaryIO


def main() -> None:
    """Answer calls until the server closes the socket.

    ``argv``: bytes of address space, bytes of the longest answer, a function with arguments that is
    called first (or null), modules that are imported before.
    """
    memory_bytes, answer_bytes = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of a function must not mix with the answers
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for module in sys.argv[4:]:
        importlib.import_module(module)
    if (first := json.loads(sys.argv[3])) is not None:
        path, args = first
        _function(path)(*args)
    answers.write(b"+")  # ready
    answers.flush()
    calls = os.fdopen(0, "rb")
    while (frame := _read(calls)) is not None:
        answer = _answer(frame)
        if len(answer) > answer_bytes:
            answer = _encode("too large", f"the answer is longer than {answer_bytes:,} bytes")
        answers.write(len(answer).to_bytes(4, "big") + answer)
        answers.flush()


def _read(calls: BinaryIO) -> bytes | None:
    """Return the next call, or None if the server has closed the socket."""
    head = calls.read(4)
    return calls.read(int.from_bytes(head, "big")) if len(head) == 4 else None


def _answer(frame: bytes) -> bytes:
    try:
        path, args, cpu_s = json.loads(frame)
        _allow_cpu(cpu_s)
        return _encode("value", _function(path)(*args))
    except MemoryError:
        return _encode("too large", "the call needs too much memory")
    except RecursionError:
        return _encode("raised", "RecursionError", "the call nests too deep")
    except Exception as error:
        return _encode("raised", type(error).__name__, str(error)[:2000])


def _function(path: str) -> Callable[..., object]:
    module, _, name = path.partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return function


def _allow_cpu(more_s: float) -> None:
    """Let the process use ``more_s`` of CPU time. Beyond that the kernel sends SIGXCPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + more_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _encode(*answer: object) -> bytes:
    return json.dumps(answer, separators=(",", ":")).encode()


if __name__ == "__main__":
    main()
