"""What another library says of a failure, fit for a client: one line, no path of this machine."""

from __future__ import annotations

import re

__all__ = ["told"]

_MAX_CHARS = 300
_PATH = re.compile(r"(?<![\w:/.\-])/[^\s/'\"<>|:]+/[^\s'\"<>|:]*")  # absolute; not in an address


def told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # the rest names the file
    lines = str(error).splitlines()
    return _PATH.sub("…", lines[0])[:_MAX_CHARS] if lines else "it gives no reason"
