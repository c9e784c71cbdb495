"""An adapter's card as clients see it, and the conditions that a change of it may carry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from fastapi import Request
from pydantic import JsonValue

from loraplex_adapter_store.card import AdapterCard
from loraplex_server.adapters.adapter_defaults import DefaultsRefused, read_defaults
from loraplex_server.api_keys import AdapterAccess
from loraplex_server.metrics.adapter_activity import AdapterActivities

from .errors import invalid
from .orjson_response import ORJSONResponse
from .state import AppState

__all__ = ["Report", "Seen", "card_response", "checked_defaults", "conditions", "shown_card"]

_ETAG = re.compile(r"[0-9a-f]{64}(\.[1-9][0-9]{0,9})?")
Report = Literal["none", "summary", "full"]  # how much of the load report is shown


@dataclass(frozen=True, slots=True)
class Seen:
    """What the engine and the requests tell of adapters at a moment."""

    resident: frozenset[str]  # digests on the device
    device_bytes: Mapping[str, int]  # that they take there
    device_load_s: Mapping[str, float]  # of their loads to there
    activities: AdapterActivities  # by name

    @classmethod
    def of(cls, state: AppState) -> Self:
        """Event loop only."""
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
    """The ``ETag`` is the digest, with the number of edits behind it once the card was edited."""
    shown = shown_card(access, card, Seen.of(state), report)
    return ORJSONResponse(shown, status=status, headers={"etag": f'"{card.etag}"'})


def shown_card(
    access: AdapterAccess, card: AdapterCard, seen: Seen, report: Report
) -> dict[str, object]:
    """Paths of the server are left out.

    So is, for a tenant, what tells of others' use of an adapter that the operator shares.
    """
    shown: dict[str, object] = {"object": "adapter", **card.to_json()}
    shown["name"] = access.shown(card.name)
    del shown["report"]
    if report != "none" and card.report is not None:
        shown["report"] = card.report.to_json() if report == "full" else card.report.summary()
    disk, host = card.n_bytes.disk, card.n_bytes.host
    tier = "device" if card.digest in seen.resident else "host" if host else "disk"
    provenance = {key: value for key, value in card.provenance.items() if key != "path"}
    if not access.owns(card.name):
        shown |= {"n_leases": None, "n_bytes": {"disk": disk, "host": None, "device": None}}
        shown |= {"usage": None, "last_load_ms": None}
        return {**shown, "tier": None, "provenance": provenance}
    n_bytes = {"disk": disk, "host": host, "device": seen.device_bytes.get(card.digest, 0)}
    on_device_s = seen.device_load_s.get(card.digest) if tier == "device" else None
    loads = {"host": _ms(card.last_load_s), "device": _ms(on_device_s)}
    usage = seen.activities.of(card.name)
    shown |= {"n_bytes": n_bytes, "usage": usage, "last_load_ms": loads}
    return {**shown, "tier": tier, "provenance": provenance}


def checked_defaults(given: Mapping[str, JsonValue], param: str = "") -> dict[str, JsonValue]:
    """Raises ApiError (400) that names the field; ``param``: what stands before it."""
    try:
        read_defaults(given)
    except DefaultsRefused as error:
        raise invalid(str(error), param + error.param) from error
    return dict(given)


def conditions(request: Request) -> tuple[str | None, bool]:
    """(If-Match, whether an existing adapter may be replaced). Raises ApiError."""
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
