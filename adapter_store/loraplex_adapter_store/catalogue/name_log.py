"""Names in the catalogue: ``names/<tenant>/<name>/<number>.json``, the highest number counts.

A change reads the newest state and creates the next number. Of all who do so at once the object
store lets one create it; the others read what it wrote and try again, or learn that they lost.

Why a number is never given twice, though old states are deleted:

- ``_prune`` and ``states`` delete a state only when the next one is older than ``GRACE_S`` by the
  clock of the object store. A writer that still believed in the deleted one would have to hold its
  answer from the listing for that long; its requests end within a minute.
- ``states`` also deletes the last one of a name that was deleted ``BURY_S`` ago. A writer that saw
  it creates the next number and then looks again: if what it saw is gone, somebody may have started
  the name anew meanwhile, so it takes its own state back and begins again. If it is still there,
  everybody who lists from now on sees the new one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from loraplex_adapter_store.errors import CatalogueUnavailable, StoredAdapterDamaged
from loraplex_adapter_store.names import is_valid_name, local_name, name_of, tenant_of

from .bucket import Bucket, StoredObject
from .name_state import NameState

__all__ = ["BURY_S", "GRACE_S", "NameLog", "Transition"]

Transition = Callable[[NameState], NameState]  # may raise: then nothing changes

GRACE_S = 3600.0  # far above the longest time that a change, or an upload's last step, can take
BURY_S = 7 * 86400.0  # until a deleted name is forgotten
_MAX_STATE_BYTES = 16 << 20
_MAX_ATTEMPTS = 100  # each one lost means that somebody else has won
_OPERATOR = "_"  # as a tenant's folder; no tenant's name begins so
_SLASH = "!"  # "/" of a name in a key; no name has it
_SUFFIX = ".json"
_log = logging.getLogger(__name__)


class NameLog:
    """Stateless and thread-safe; every call asks the object store. Raises CatalogueUnavailable."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def read(self, name: str) -> NameState:
        """The name as it is now: one listing and one read. Raises StoredAdapterDamaged."""
        return self._newest(name)[0]

    def read_numbered(self, name: str, number: int) -> NameState | None:
        """None if that state is not there (any more). Raises StoredAdapterDamaged."""
        data = self._bucket.read(_key(name, number), _MAX_STATE_BYTES)
        return None if data is None else NameState.from_json(data, name, number)

    def newest_number(self, name: str) -> int:
        """0 if there is no state. One listing."""
        return max(self._states(name), default=0)

    def newest_numbers(self, tenant: str | None = None) -> Mapping[str, int]:
        """Of every name, or every name of a tenant: one listing. Deleted names are among them."""
        folder = "names/" if tenant is None else f"names/{tenant or _OPERATOR}/"
        newest: dict[str, int] = {}
        for found in self._bucket.objects(folder):
            parsed = _parse(found.key)
            if parsed is not None:
                name, number = parsed
                newest[name] = max(number, newest.get(name, 0))
        return newest

    def change(self, name: str, transition: Transition) -> tuple[NameState, NameState]:
        """(before, after); ``transition`` makes the one from the other, perhaps several times.

        Raises what it raises; then nothing changed. After CatalogueUnavailable it may have.
        """
        for _ in range(_MAX_ATTEMPTS):
            before, states = self._newest(name)
            after = transition(before)
            if not self._create(after):
                continue
            if before.number and before.current is None and not self._is_there(before):
                self._bucket.delete([_key(name, after.number)])
                continue
            self._prune(name, states, after.number)
            return before, after
        raise CatalogueUnavailable(f"adapter {name!r} is changed all the time; try again")

    def states(self, name: str, now: float) -> list[NameState]:
        """All that there are, once old ones are deleted; none for a name that is buried by it.

        ``now``: by the clock of the object store. Raises StoredAdapterDamaged.
        """
        listed = self._states(name)
        old = _superseded(listed, now)
        self._bucket.delete([_key(name, number) for number in old])
        left = sorted(set(listed) - set(old))
        states = [s for number in left if (s := self.read_numbered(name, number)) is not None]
        if len(states) != 1 or states[0].current is not None:
            return states
        (last,) = states
        if now - listed[last.number].modified <= BURY_S:
            return states
        self._bucket.delete([_key(name, last.number)])
        return []

    def _newest(self, name: str) -> tuple[NameState, dict[int, StoredObject]]:
        for _ in range(_MAX_ATTEMPTS):
            states = self._states(name)
            if not states:
                return NameState(name), states
            state = self.read_numbered(name, max(states))
            if state is not None:
                return state, states  # else it was buried between listing and reading
        raise CatalogueUnavailable(f"adapter {name!r} is changed all the time; try again")

    def _states(self, name: str) -> dict[int, StoredObject]:
        found = ((_parse(each.key), each) for each in self._bucket.objects(_folder(name)))
        return {parsed[1]: each for parsed, each in found if parsed is not None}

    def _create(self, state: NameState) -> bool:
        if self._bucket.create(_key(state.name, state.number), state.to_json()):
            return True
        try:
            there = self.read_numbered(state.name, state.number)
        except StoredAdapterDamaged:
            return False
        # A retry below us may have met the object of its own first try.
        return there is not None and there.write_id == state.write_id

    def _is_there(self, state: NameState) -> bool:
        return state.number in self._states(state.name)

    def _prune(self, name: str, states: Mapping[int, StoredObject], newest: int) -> None:
        """Deletes states whose successor is older than the grace. Not pressing: it may fail."""
        if len(states) < 2:
            return
        try:
            now = max(each.modified for n, each in self._states(name).items() if n >= newest)
            self._bucket.delete([_key(name, number) for number in _superseded(states, now)])
        except (CatalogueUnavailable, ValueError) as error:
            _log.debug("old states of adapter %s stay for now: %s", name, error)


def _superseded(states: Mapping[int, StoredObject], now: float) -> list[int]:
    """Numbers of those whose successor is older than the grace, the oldest first."""
    return [
        number
        for number in sorted(states)
        if number + 1 in states and now - states[number + 1].modified > GRACE_S
    ]


def _folder(name: str) -> str:
    tenant = tenant_of(name) or _OPERATOR
    return f"names/{tenant}/{local_name(name).replace('/', _SLASH)}/"


def _key(name: str, number: int) -> str:
    return f"{_folder(name)}{number:010d}{_SUFFIX}"


def _parse(key: str) -> tuple[str, int] | None:
    """(name, number); None for what is no state: nothing of ours, or half written."""
    parts = key.split("/")
    if len(parts) != 4 or not parts[3].endswith(_SUFFIX):
        return None
    number = parts[3].removesuffix(_SUFFIX)
    name = name_of("" if parts[1] == _OPERATOR else parts[1], parts[2].replace(_SLASH, "/"))
    if not (number.isascii() and number.isdigit() and is_valid_name(name)):
        return None
    return name, int(number)
