"""Names in the catalogue: ``names/<tenant>/<name>/<number>.json``; the highest number counts.

A change reads the newest state and creates the next number. Of all concurrent writers, the object
store lets one create it; the others read the new state and try again, or lose.

Why no number is used twice, although old states are deleted:

- ``_prune`` and ``states`` delete a state only if its successor is older than ``GRACE_S`` by the
  clock of the object store. A writer that still used the deleted state would have to keep its
  listing for that long, but its requests end within a minute.
- ``states`` also deletes the last state of a name that was deleted ``BURY_S`` ago. A writer that
  read this state creates the next number and then lists again. If the old state is gone, another
  writer may have started the name anew, so the writer deletes its own state and begins again. If
  the old state is still there, every later listing shows the new one.
"""

import logging
from collections.abc import Mapping

from loraplex_adapter_store.errors import CatalogueUnavailable, StoredAdapterDamaged
from loraplex_adapter_store.names.name_state import Change, NameState, Transition
from loraplex_adapter_store.names.name_syntax import is_valid_name, local_name, name_of, tenant_of

from .bucket import Bucket, StoredObject

GRACE_S = 3600.0  # far above the longest time of a change, or of an upload's last step
BURY_S = 7 * 86400.0  # until the history of a deleted name is forgotten
_MAX_STATE_BYTES = 16 << 20
_MAX_ATTEMPTS = 100  # each lost attempt means that another writer has won
_OPERATOR = "_"  # folder of the operator; no tenant's name begins with it
_SLASH = "!"  # replaces "/" of a name in a key; no name contains it
_SUFFIX = ".json"
_log = logging.getLogger(__name__)


class NameLog:
    """Stateless and thread-safe. Each call asks the object store or raises CatalogueUnavailable."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def read(self, name: str) -> NameState:
        """Return the newest state: one listing and one read. Raises StoredAdapterDamaged."""
        return self._newest(name)[0]

    def read_numbered(self, name: str, number: int) -> NameState | None:
        """Return that state, or None if it does not exist. Raises StoredAdapterDamaged."""
        data = self._bucket.read(_key(name, number), _MAX_STATE_BYTES)
        return None if data is None else NameState.from_json(data, name, number)

    def newest_number(self, name: str) -> int:
        """Return the highest number, or 0 without any state. One listing."""
        return max(self._states(name), default=0)

    def newest_numbers(self, tenant: str | None = None) -> Mapping[str, int]:
        """Return the numbers of all names, or of a tenant's, deleted ones too. One listing."""
        folder = "names/" if tenant is None else f"names/{tenant or _OPERATOR}/"
        newest: dict[str, int] = {}
        for each in self._bucket.objects(folder):
            parsed = _parse(each.key)
            if parsed is not None:
                name, number = parsed
                newest[name] = max(number, newest.get(name, 0))
        return newest

    def change(self, name: str, transition: Transition) -> Change:
        """Write the next state, which ``transition`` makes from the newest, perhaps repeatedly.

        Raises what ``transition`` raises, and then nothing has changed. After CatalogueUnavailable
        the change may have happened.
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
            return Change(before, after)
        raise CatalogueUnavailable(f"adapter {name!r} is changed all the time; try again")

    def states(self, name: str, now: float) -> list[NameState]:
        """Delete old states, and return the others. ``now``: by the clock of the object store.

        A name that was deleted ``BURY_S`` ago has none. Raises StoredAdapterDamaged.
        """
        listed = self._states(name)
        old = _superseded(listed, now)
        self._bucket.delete([_key(name, number) for number in old])
        remaining = sorted(set(listed) - set(old))
        states = [s for number in remaining if (s := self.read_numbered(name, number)) is not None]
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
                return state, states  # else it was deleted between listing and reading
        raise CatalogueUnavailable(f"adapter {name!r} is changed all the time; try again")

    def _states(self, name: str) -> dict[int, StoredObject]:
        objects = ((_parse(each.key), each) for each in self._bucket.objects(_folder(name)))
        return {parsed[1]: each for parsed, each in objects if parsed is not None}

    def _create(self, state: NameState) -> bool:
        if self._bucket.create(_key(state.name, state.number), state.to_json()):
            return True
        try:
            there = self.read_numbered(state.name, state.number)
        except StoredAdapterDamaged:
            return False
        # A retry of the client library may have met the object of its own first try.
        return there is not None and there.write_id == state.write_id

    def _is_there(self, state: NameState) -> bool:
        return state.number in self._states(state.name)

    def _prune(self, name: str, states: Mapping[int, StoredObject], newest: int) -> None:
        """Delete states whose successor is older than ``GRACE_S``. A failure has no effect."""
        if len(states) < 2:
            return
        try:
            now = max(each.modified for n, each in self._states(name).items() if n >= newest)
            self._bucket.delete([_key(name, number) for number in _superseded(states, now)])
        except (CatalogueUnavailable, ValueError) as error:
            _log.debug("old states of adapter %s stay for now: %s", name, error)


def _superseded(states: Mapping[int, StoredObject], now: float) -> list[int]:
    """Return the numbers whose successor is older than the grace, ascending."""
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
    """Return (name, number), or None if the key is not that of a state."""
    parts = key.split("/")
    if len(parts) != 4 or not parts[3].endswith(_SUFFIX):
        return None
    number = parts[3].removesuffix(_SUFFIX)
    name = name_of("" if parts[1] == _OPERATOR else parts[1], parts[2].replace(_SLASH, "/"))
    if not (number.isascii() and number.isdigit() and is_valid_name(name)):
        return None
    return name, int(number)
