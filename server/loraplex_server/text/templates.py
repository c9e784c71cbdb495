"""Renders untrusted chat templates in worker processes."""

import time
from collections.abc import Mapping, Sequence
from hashlib import sha256

import orjson

from loraplex_server.errors import ApiError, invalid, unavailable
from loraplex_server.worker_processes.pool import (
    CallFailed,
    CallTooLarge,
    CallTooLong,
    WorkerProcesses,
    WorkersBusy,
)

from . import template_render

_CPU_S = 1.0
_MAX_S = 10.0  # wall time, for a machine without a free processor
_MEMORY_BYTES = 256 << 20
_TEXT_BYTES = 8 << 20
_REFUSED_S = 60.0
_SMALL_BYTES = 64 << 10  # messages that every sane template renders quickly
_MAX_REFUSED = 1024


class Templates:
    """The template renderer of one server. Lives on its event loop.

    A tenant renders one chat at a time, so slow templates occupy at most one process. A template
    that had to be stopped is refused to its tenant for a minute. Other tenants may use it.
    """

    def __init__(self) -> None:
        self._workers = WorkerProcesses(
            "chats with an adapter's template",
            max_wait_s=_MAX_S,
            memory_bytes=_MEMORY_BYTES,
            answer_bytes=_TEXT_BYTES,
            preload=[template_render.__name__],
        )
        self._refused: dict[bytes, tuple[float, str]] = {}  # (end, reason); oldest first

    async def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, object]],
        options: Mapping[str, object],
        *,
        continue_final_message: bool,
        tenant: str,
        remember: bool,
    ) -> str:
        """Render a chat. With ``remember``, a template that fails on a small chat is refused later.

        Raises ApiError: 400 for a template that fails, 503 if no worker process is free, 429 if
        too many chats of the tenant wait.
        """
        key = sha256(f"{tenant}\0{template}".encode()).digest()
        try:
            async with self._workers.turn_of(tenant):
                self._check_refused(key)
                return await self._workers.run(
                    template_render.render,
                    [template, messages, options, continue_final_message],
                    timeout_s=_MAX_S,
                    cpu_s=_CPU_S,
                )
        except WorkersBusy as error:
            raise unavailable(f"chat templates: {error}", "templates_busy") from error
        except CallFailed as error:
            stopped = isinstance(error, CallTooLong | CallTooLarge)
            # Set before the next request of the tenant gets its turn.
            if remember and stopped and len(orjson.dumps([messages, options])) < _SMALL_BYTES:
                self._refuse(key, str(error))
            raise unrenderable(str(error)) from error

    async def close(self) -> None:
        await self._workers.close()

    def _check_refused(self, key: bytes) -> None:
        until, why = self._refused.get(key, (0.0, ""))
        if time.monotonic() < until:
            raise unrenderable(f"{why}; the last try was less than {_REFUSED_S:g} s ago")

    def _refuse(self, key: bytes, why: str) -> None:
        now = time.monotonic()
        self._refused = {k: v for k, v in self._refused.items() if v[0] > now and k != key}
        if len(self._refused) >= _MAX_REFUSED:
            del self._refused[next(iter(self._refused))]
        self._refused[key] = (now + _REFUSED_S, why)


def unrenderable(reason: str) -> ApiError:
    return invalid(
        f"the chat template cannot render these messages: {reason}",
        "messages",
        "chat_template_error",
    )
