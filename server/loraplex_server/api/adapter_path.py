"""The path of an adapter: its name, slashes and all, that does not end in one of its actions.

``{name:path}`` alone would take ``/v1/adapters/x/pin`` for an adapter ``x/pin``, and a method that
the action lacks for a request about that adapter. Likewise ``/v1/adapters/generate`` and
``/v1/adapters/train``. The store takes no adapter of such a name.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.convertors import PathConvertor, register_url_convertor

from loraplex_adapter_store.errors import InvalidName
from loraplex_adapter_store.names import RESERVED_ENDINGS, check_name
from loraplex_server.adapters.access import access_of, name_to_write, own_name, stored_name

from .state import State, followed, in_store_thread

__all__ = ["ADAPTER_PATH", "AdapterName", "NewName", "OwnName", "why_not_put"]

_PREFIX = "/v1/adapters/"
_MAKERS = ("generate", "train")  # routes that make an adapter
ADAPTER_PATH = _PREFIX + "{name:adapter}"


class _AdapterPath(PathConvertor):
    regex = rf"(?!(?:{'|'.join(_MAKERS)})$|.*[^/]/(?:{'|'.join(RESERVED_ENDINGS)})$).*"


register_url_convertor("adapter", _AdapterPath())


def why_not_put(method: str, path: str) -> str | None:
    """What a PUT is told whose adapter would have the path of another route; else None."""
    if method != "PUT" or not path.startswith(_PREFIX):
        return None
    try:
        check_name(path.removeprefix(_PREFIX))
    except InvalidName as error:
        return str(error)
    return None


async def _stored_name(request: Request, name: str, state: State) -> str:
    access = access_of(request)
    await followed(state, access, name, param="name")
    return stored_name(state.store, access, name, param="name")


async def _own_name(request: Request, name: str, state: State) -> str:
    access = access_of(request)
    await followed(state, access, name, param="name")
    return own_name(state.store, access, name, param="name")


async def _name_to_write(request: Request, name: str, state: State) -> str:
    access = access_of(request)
    return await in_store_thread(
        state, lambda: name_to_write(state.store, access, name, param="name"), access
    )


# The ``{name}`` of a route's path, as the store knows it.
AdapterName = Annotated[str, Depends(_stored_name)]
OwnName = Annotated[str, Depends(_own_name)]  # for routes that change the adapter
NewName = Annotated[str, Depends(_name_to_write)]  # for routes that give it new weights
