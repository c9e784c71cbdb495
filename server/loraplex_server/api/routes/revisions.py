"""The revisions of an adapter: list them, and make an older one current again."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from loraplex_server.api.adapter_card import Report, card_response, conditions
from loraplex_server.api.adapter_path import AdapterName, OwnName
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.protocol.adapters import Adapter, RevisionList
from loraplex_server.api.protocol.errors import errors
from loraplex_server.api.state import Access, State, in_change_thread, in_store_thread

router = APIRouter(tags=["Adapters"])


@router.get(
    "/v1/adapters/{name:path}/revisions", response_model=RevisionList, responses=errors(404)
)
async def list_revisions(name: AdapterName, access: Access, state: State) -> Response:
    """List the current revision first, then older ones, newest first."""
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
    access: Access,
    state: State,
    digest: Annotated[str | None, Query(min_length=4, max_length=64)] = None,
    report: Report = "summary",
) -> Response:
    """Return to the previous revision, or to the revision whose digest begins with ``digest``.

    Running requests finish on their revision. ``If-Match`` makes it a compare-and-set.
    """
    state.lifecycle.check_engine()
    if_match, _ = conditions(request)
    card = await in_change_thread(
        state,
        lambda: state.store.rollback(name, digest_prefix=digest, if_match=if_match),
        access,
    )
    return card_response(state, access, card, report)
