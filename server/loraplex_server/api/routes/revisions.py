"""Older contents of an adapter's name: which are kept, and making one current again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from loraplex_server.adapters.access import access_of
from loraplex_server.api.adapter_card import Report, card_response, conditions
from loraplex_server.api.adapter_path import AdapterName, OwnName
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import Adapter, RevisionList
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import State, in_store_thread

__all__ = ["router"]

router = APIRouter()


@router.get(
    "/v1/adapters/{name:path}/revisions", response_model=RevisionList, responses=errors(404)
)
async def list_revisions(request: Request, name: AdapterName, state: State) -> Response:
    """The current revision first, then the kept ones, newest first."""
    access = access_of(request)
    cards = await in_store_thread(state, lambda: state.store.revisions(name), access)
    data = [
        {
            "object": "adapter.revision",
            "name": access.shown(card.name),
            "revision": card.revision,
            "digest": card.digest,
            "created": card.created,
            "family": card.family.value,
            "description": card.description,
            "current": card is cards[0],
        }
        for card in cards
    ]
    return ORJSONResponse({"object": "list", "data": data})


@router.post(
    "/v1/adapters/{name:path}/rollback", response_model=Adapter, responses=errors(404, 412)
)
async def rollback(
    request: Request,
    name: OwnName,
    state: State,
    digest: Annotated[str | None, Query(min_length=4, max_length=64)] = None,
    report: Report = "summary",
) -> Response:
    """To the revision before the current one, or to the one whose digest begins with ``digest``.

    Running requests finish on what they have. ``If-Match`` makes it compare-and-set.
    """
    state.lifecycle.check_engine()
    if_match, _ = conditions(request)
    card = await in_store_thread(
        state,
        lambda: state.store.rollback(name, digest_prefix=digest, if_match=if_match),
        access_of(request),
        pool=state.pools.changes,
    )
    return card_response(state, access_of(request), card, report)
