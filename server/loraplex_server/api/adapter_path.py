"""The path of an adapter: its name, which may hold slashes but does not end in an action.

``{name:path}`` alone would match ``/v1/adapters/x/pin`` as an adapter ``x/pin``, for methods that
the action lacks. The same holds for ``/v1/adapters/generate`` and ``/v1/adapters/train``. The store
refuses adapters with such names.
"""

from typing import Annotated

from fastapi import Depends
from starlette.convertors import PathConvertor, register_url_convertor

from loraplex_adapter_store.errors import InvalidName
from loraplex_adapter_store.names.name_syntax import RESERVED_ENDINGS, check_name
from loraplex_server.adapters.resolving.access import (
    name_to_write,
    own_name,
    stored_name,
    until_added,
)
from loraplex_server.settings.api_keys import AdapterAccess

from .state import Access, AppState, State, followed, in_store_thread

_PREFIX = "/v1/adapters/"
_MAKERS = ("generate", "train")  # routes that make an adapter
ADAPTER_PATH = _PREFIX + "{name:adapter}"


class _AdapterPath(PathConvertor):
    regex = rf"(?!(?:{'|'.join(_MAKERS)})$|.*[^/]/(?:{'|'.join(RESERVED_ENDINGS)})$).*"


register_url_convertor("adapter", _AdapterPath())


def why_not_put(method: str, path: str) -> str | None:
    """Return the reason why a PUT path cannot name an adapter, or None for other requests."""
    if method != "PUT" or not path.startswith(_PREFIX):
        return None
    try:
        check_name(path.removeprefix(_PREFIX))
    except InvalidName as error:
        return str(error)
    return None


async def _stored_name(name: str, access: Access, state: State) -> str:
    await followed(state, access, name, param="name")
    return stored_name(state.store, access, name, param="name")


async def _own_name(name: str, access: Access, state: State) -> str:
    await followed(state, access, name, param="name")
    return own_name(state.store, access, name, param="name")


async def new_name(
    name: str, access: AdapterAccess, state: AppState, *, param: str = "name"
) -> str:
    """Return the stored name for new weights. Raises ApiError for the field ``param``."""
    await until_added(state.store, access, [name])
    return await in_store_thread(
        state, lambda: name_to_write(state.store, access, name, param=param), access
    )


async def _new_name(name: str, access: Access, state: State) -> str:
    return await new_name(name, access, state)


# The ``{name}`` of a route's path, as the store's name.
AdapterName = Annotated[str, Depends(_stored_name)]
OwnName = Annotated[str, Depends(_own_name)]  # of routes that change the adapter
NewName = Annotated[str, Depends(_new_name)]  # of routes that add weights
