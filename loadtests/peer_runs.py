"""What of a scenario the peers can run, and how they are asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .peers.peft_batch import PeftBatch
from .peers.systems import SYSTEMS, System
from .scenario import Phase
from .traffic import Body

__all__ = ["PEERS", "bodies_of", "fits_peer", "peer_systems"]

PEERS: Mapping[str, type[System]] = {
    **{name: system for name, system in SYSTEMS.items() if name != "loraplex"},
    PeftBatch.name: PeftBatch,
}
_MAX_ADAPTERS = 64  # more slots than that none of them starts with on a small machine


def fits_peer(phase: Phase) -> Phase | None:
    """The phase as a peer can run it: base and plain LoRA only, all of them loaded at start."""
    mix = {family: share for family, share in phase.mix.items() if family in ("base", "lora")}
    if phase.kind != "load" or phase.churn_per_s or not any(mix.values()):
        return None
    if not 0 < phase.adapters <= _MAX_ADAPTERS and mix.get("lora"):
        return None
    return replace(phase, mix=mix, warm=False)


def bodies_of(system: System) -> Body:
    def body(family: str, name: str | None) -> Mapping[str, Any]:
        return system.body(None if name is None else int(name.removeprefix("a")))

    return body


def peer_systems(
    names: Sequence[str], venvs: Mapping[str, Path | None], work: Path, notes: list[str]
) -> Iterator[tuple[str, System]]:
    """Those that can be run here; why not, for the others, goes to ``notes``."""
    for name in names:
        if name not in PEERS:
            notes.append(f"skipping {name}: unknown peer; known: {', '.join(PEERS)}")
            continue
        system = PEERS[name](venvs.get(name), work)
        reason = system.missing()
        if reason is None:
            yield name, system
        else:
            notes.append(f"skipping {name}: {reason}")
