"""The possible states of each name: acknowledged, or requested and not answered yet."""

import time
from dataclasses import dataclass, field

GONE = None  # the mark of a name that is not there


@dataclass(slots=True)
class _State:
    mark: int | None
    since: float  # from here on it may be so
    until: float = float("inf")  # from here on it cannot be so any more


@dataclass(slots=True)
class _Name:
    states: list[_State] = field(default_factory=lambda: [_State(GONE, 0.0)])


class Ledger:
    """The states of each name, with one change at a time and any number of readers."""

    def __init__(self, names: list[str]) -> None:
        self._names = {name: _Name() for name in names}
        self.busy: set[str] = set()  # names with a change under way
        self.n_acknowledged = 0

    def begin(self, name: str, mark: int | None) -> None:
        """A change is sent: from now on it may be so."""
        self.busy.add(name)
        self._names[name].states.append(_State(mark, time.monotonic()))

    def acknowledge(self, name: str) -> None:
        """It was answered: what was before cannot be any more."""
        now = time.monotonic()
        for state in self._names[name].states[:-1]:
            state.until = min(state.until, now)
        self.n_acknowledged += 1
        self._end(name)

    def refuse(self, name: str) -> None:
        """It was answered with an error: it is not so."""
        self._names[name].states[-1].until = time.monotonic()
        self._end(name)

    def lose_touch(self, name: str) -> None:
        """No answer came: either may be so until ``find``."""
        self.busy.discard(name)

    def find(self, name: str, mark: int | None) -> bool:
        """A restarted server shows ``mark``. False if that cannot be: something is lost."""
        now = time.monotonic()
        open_states = [s for s in self._names[name].states if s.until == float("inf")]
        is_possible = any(state.mark == mark for state in open_states)
        for state in open_states:
            state.until = now
        self._names[name].states.append(_State(mark, now))
        self._forget(name)
        return is_possible

    def possible(self, name: str, since: float) -> set[int | None]:
        """Return the states that a request from ``since`` until now may have seen."""
        return {state.mark for state in self._names[name].states if state.until >= since}

    def present(self) -> list[str]:
        """Names that may be there."""
        return [n for n, name in self._names.items() if name.states[-1].mark is not GONE]

    def _end(self, name: str) -> None:
        self.busy.discard(name)
        self._forget(name)

    def _forget(self, name: str) -> None:
        old = time.monotonic() - 300.0  # longer than any request lasts
        entry = self._names[name]
        entry.states = [state for state in entry.states if state.until > old]
