"""Shows an adapter's card to clients, and reads the conditions of a change."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from fastapi import Request

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_server.errors import invalid
from loraplex_server.metrics.adapter_usage import AdapterActivities
from loraplex_server.settings.api_keys import AdapterAccess

from .orjson_response import ORJSONResponse
from .state import AppState

_ETAG = re.compile(r"[0-9a-f]{64}(\.[1-9][0-9]{0,9})?")
Report = Literal["none", "summary", "full"]  # how much of the load report is shown


@dataclass(frozen=True, slots=True)
class AdapterActivity:
    """The device memory and the use of all adapters at one moment."""

    resident: frozenset[str]  # digests on the device
    device_bytes: Mapping[str, int]  # digest → bytes on the device
    device_load_s: Mapping[str, float]  # digest → time of the last load to the device
    activities: AdapterActivities  # by name

    @classmethod
    def of(cls, state: AppState) -> Self:
        """Called on the event loop."""
        stats = state.engine.stats()
        resident = frozenset(stats.resident_adapters)
        return cls(resident, stats.resident_bytes, stats.resident_load_s, state.metrics.activities)


def card_response(
    state: AppState,
    access: AdapterAccess,
    card: AdapterCard,
    report: Report = "summary",
    *,
    status: int = 200,
) -> ORJSONResponse:
    """Answer with the card. The ``ETag`` is the digest with the number of edits."""
    shown = shown_card(access, card, AdapterActivity.of(state), report)
    return ORJSONResponse(shown, status=status, headers={"etag": f'"{card.etag}"'})


def shown_card(
    access: AdapterAccess, card: AdapterCard, activity: AdapterActivity, report: Report
) -> dict[str, object]:
    """Return the card as JSON, without paths of the server.

    A tenant does not see how others use an adapter that the operator shares.
    """
    shown: dict[str, object] = {"object": "adapter", **card.to_json()}
    shown["name"] = access.shown(card.name)
    del shown["report"]
    if report != "none" and card.report is not None:
        shown["report"] = card.report.to_json() if report == "full" else card.report.summary()
    disk, host = card.n_bytes.disk, card.n_bytes.host
    tier = "device" if card.digest in activity.resident else "host" if host else "disk"
    provenance = {key: value for key, value in card.provenance.items() if key != "path"}
    if not access.owns(card.name):
        shown |= {"n_leases": None, "n_bytes": {"disk": disk, "host": None, "device": None}}
        shown |= {"usage": None, "last_load_ms": None}
        return {**shown, "tier": None, "provenance": provenance}
    n_bytes = {"disk": disk, "host": host, "device": activity.device_bytes.get(card.digest, 0)}
    on_device_s = activity.device_load_s.get(card.digest) if tier == "device" else None
    loads = {"host": _ms(card.last_load_s), "device": _ms(on_device_s)}
    usage = activity.activities.of(card.name)
    shown |= {"n_bytes": n_bytes, "usage": usage, "last_load_ms": loads}
    return {**shown, "tier": tier, "provenance": provenance}


def conditions(request: Request) -> tuple[str | None, bool]:
    """Return If-Match, and True if an existing adapter may be replaced. Raises ApiError."""
    if_match = request.headers.get("if-match")
    if_none = request.headers.get("if-none-match")
    if if_none is not None and if_none.strip() != "*":
        raise invalid("If-None-Match must be *", "If-None-Match")
    if if_match is not None:
        if_match = if_match.strip().removeprefix("W/").strip('"')
        if _ETAG.fullmatch(if_match) is None:
            raise invalid("If-Match must be the adapter's ETag, a full digest", "If-Match")
    return if_match, if_none is None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
