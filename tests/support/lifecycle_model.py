"""A model of adapters' life: the state after calls, and an order that explains concurrent ones.

``explain`` looks for an order of concurrent calls in which each would have got the answer that it
got: the calls are linearizable if there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

Answer = tuple[object, ...]  # status first, then what else must be right


@dataclass(frozen=True)
class Call:
    kind: str
    name: str = ""
    content: str = ""  # digest that it brings, asks for, or must match
    other: str = ""  # second name of a mixture
    expires: float | None = None


@dataclass(frozen=True)
class Named:
    current: str
    kept: tuple[str, ...] = ()  # newest first
    expires: float | None = None
    pinned: bool = False

    def moved_to(self, digest: str, n_kept: int, expires: float | None) -> Named:
        older = (self.current, *self.kept)
        kept = tuple(old for old in older if old != digest)[:n_kept]
        return replace(self, current=digest, kept=kept, expires=expires)


@dataclass(frozen=True)
class State:
    n_kept: int
    now: float = 0.0
    names: Mapping[str, Named] = field(default_factory=dict)

    def having(self, name: str, entry: Named | None) -> State:
        names = {key: value for key, value in self.names.items() if key != name}
        return replace(self, names=names if entry is None else {**names, name: entry})


def apply(
    state: State, call: Call, mixture_of: Callable[[str, str], str]
) -> tuple[Answer | None, State]:
    """Return the answer to ``call`` in ``state`` (None: no answer), and the next state."""
    there = state.names.get(call.name)
    moved = None if there is None else there.moved_to(call.content, state.n_kept, None)
    new = Named(call.content) if moved is None else moved
    match call.kind:
        case "put":
            return (201 if there is None else 200, call.content), state.having(call.name, new)
        case "create":  # If-None-Match: *
            if there is not None:
                return (412,), state
            return (201, call.content), state.having(call.name, new)
        case "delete":
            if there is None:
                return (404,), state
            return (200, there.current), state.having(call.name, None)
        case "delete if":  # If-Match
            if there is None:
                return (404,), state
            if there.current != call.content:
                return (412,), state
            return (200, there.current), state.having(call.name, None)
        case "get" | "chat":
            return (404,) if there is None else (200, there.current), state
        case "chat digest":
            known = () if there is None else (there.current, *there.kept)
            return (200, call.content) if call.content in known else (404,), state
        case "mixture":
            other = state.names.get(call.other)
            if there is None or other is None:
                return (404,), state
            return (200, mixture_of(there.current, other.current)), state
        case "pin" | "unpin":
            if there is None:
                return (404,), state
            pinned = replace(there, pinned=call.kind == "pin")
            return (200,), state.having(call.name, pinned)
        case "unload":  # refused only for a pin: whether it was in use depends on the instant
            if there is None:
                return (404,), state
            same = [entry for entry in state.names.values() if entry.current == there.current]
            return (409 if any(entry.pinned for entry in same) else 200,), state
        case "rollback":
            if there is None:
                return (404,), state
            if not there.kept:
                return (400,), state
            back = there.moved_to(there.kept[0], state.n_kept, None)
            return (200, back.current), state.having(call.name, back)
        case "generate":  # unnamed: made, or used again
            made = Named(call.content, expires=call.expires)
            if there is not None:
                made = replace(there, current=call.content, expires=call.expires)
            return (201, call.content), state.having(call.name, made)
        case "generate named":
            if there is not None:
                return (412,), state
            entry = Named(call.content, expires=call.expires)
            return (201, call.content), state.having(call.name, entry)
        case "list":
            shown = {(name, entry.current) for name, entry in state.names.items()}
            return (200, frozenset(shown)), state
        case "expire":
            due = there is not None and there.expires is not None and there.expires <= state.now
            return None, state.having(call.name, None) if due else state
    raise ValueError(call.kind)


def explain(
    state: State,
    calls: Sequence[tuple[Call, Answer | None]],
    mixture_of: Callable[[str, str], str],
) -> set[tuple[tuple[str, Named], ...]]:
    """Return the final states of all orders that explain the answers; empty if none does."""
    found: set[tuple[tuple[str, Named], ...]] = set()
    seen: set[tuple[frozenset[int], tuple[tuple[str, Named], ...]]] = set()

    def search(state: State, left: frozenset[int]) -> None:
        names = tuple(sorted(state.names.items(), key=lambda item: item[0]))
        if (left, names) in seen:
            return
        seen.add((left, names))
        if not left:
            found.add(names)
            return
        for index in left:
            call, answer = calls[index]
            expected, after = apply(state, call, mixture_of)
            if expected is None or answer is None or expected == answer:
                search(after, left - {index})

    search(state, frozenset(range(len(calls))))
    return found
