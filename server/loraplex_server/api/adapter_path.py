"""The path of an adapter: its name, slashes and all, that does not end in one of its actions.

``{name:path}`` alone would take ``/v1/adapters/x/pin`` for an adapter ``x/pin``, and a method that
the action lacks for a request about that adapter. Likewise ``/v1/adapters/generate``.
"""

from __future__ import annotations

from starlette.convertors import PathConvertor, register_url_convertor

__all__ = ["ACTIONS", "ADAPTER_PATH"]

ACTIONS = ("pin", "unpin", "warm", "revisions", "rollback", "routing")
ADAPTER_PATH = "/v1/adapters/{name:adapter}"


class _AdapterName(PathConvertor):
    regex = rf"(?!generate$|.*[^/]/(?:{'|'.join(ACTIONS)})$).*"


register_url_convertor("adapter", _AdapterName())
