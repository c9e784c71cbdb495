"""Rules that hold for every answer to any request."""

import json
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

import httpx

from .cases import Case

# for load only, with the code that explains it
_MAY_BE_BUSY = ("queue_full", "adapter_memory_full", "too_many_connections")
_PATH = re.compile(r"(?<![\w:/.\-%])/(?:root|home|tmp|usr|opt|var|etc|work|proc|dev|mnt)/[^\s\"']*")
_INSIDE = re.compile(
    r"Traceback|site-packages|<class '|object at 0x|NoneType|instance of"
    r"|\b[A-Z]\w*(?:Error|Exception)\b"
)
_TYPES = ("InvalidUserInput", "NotFoundError")  # vLLM's words for a kind of error


class Judge:
    def __init__(self, secrets: Sequence[str]) -> None:
        """``secrets``: paths of the server that no answer may show."""
        self._secrets = secrets

    def problem(self, case: Case, answer: httpx.Response) -> str | None:
        text = answer.text
        if shown := [secret for secret in self._secrets if secret in text]:
            return f"shows {shown[0]}"
        if answer.status_code >= 400:
            return self._of_error(case, answer)
        if case.wire is not None:
            return f"{case.wire} were accepted"
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            for line in text.split("\n\n"):
                if line.startswith('data: {"error"'):
                    return self._of_object(case, json.loads(line[6:]), None)
        return None

    def _of_error(self, case: Case, answer: httpx.Response) -> str | None:
        status = answer.status_code
        if case.method == "HEAD":
            return "a server error" if status >= 500 else None
        if answer.headers.get("content-type") != "application/json":
            return f"the error is {answer.headers.get('content-type')}"
        try:
            body = json.loads(answer.content)
        except ValueError:
            return "the error is no JSON"
        if status == 503:
            is_busy = body.get("error", {}).get("code") in _MAY_BE_BUSY
            if not is_busy or "retry-after" not in answer.headers:
                return "an unexplained 503"
        elif status >= 500:
            return "a server error"
        return self._of_object(case, body, status)

    def _of_object(self, case: Case, body: Any, status: int | None) -> str | None:
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict) or not error.keys() >= {"message", "type", "param", "code"}:
            return "no error object"
        if not (isinstance(error["message"], str) and isinstance(error["code"], str)):
            return "no message or code"
        if not error["message"] or not (error["param"] is None or isinstance(error["param"], str)):
            return "an empty message, or a param that is no text"
        if status is None and error["type"] == "server_error":
            return "a server error in a stream"
        told = {key: value for key, value in error.items() if value not in _TYPES}
        shown = json.dumps(told, ensure_ascii=False)
        # an answer may show what was sent, shortened
        sent = f"{unquote(case.path)} {case.content.decode(errors='replace')}"
        for found in (*_PATH.finditer(shown), *_INSIDE.finditer(shown)):
            if found[0].partition("...")[0].strip("\\,.;:)")[:40] not in sent:
                return f"shows {found[0]!r}"
        return None
