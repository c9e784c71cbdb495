"""Selects the baselines that can run here, and the part of a scenario that they can run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loadtests.scenario import Phase
from loadtests.systems import System

from .llama_cpp import LlamaCpp
from .mistral_rs import MistralRs
from .peft_batch import PeftBatch
from .vllm_cpu import VllmCpu

BASELINES: Mapping[str, type[System]] = {
    system.name: system for system in (VllmCpu, LlamaCpp, MistralRs, PeftBatch)
}
_MAX_ADAPTERS = 64  # with more slots than that none of them starts on a small machine


def installed_baselines(
    names: Sequence[str], venvs: Mapping[str, Path | None], notes: list[str]
) -> Iterator[System]:
    """Return the baselines that can run, and add to ``notes`` why others cannot."""
    for name in names:
        if name not in BASELINES:
            notes.append(f"skipping {name}: unknown baseline; known: {', '.join(BASELINES)}")
            continue
        system = BASELINES[name](venvs.get(name))
        reason = system.missing()
        if reason is None:
            yield system
        else:
            notes.append(f"skipping {name}: {reason}")


def phase_for_baseline(phase: Phase) -> Phase | None:
    """Reduce a scenario to base and plain LoRA, with all adapters loaded at start."""
    mix = {family: share for family, share in phase.mix.items() if family in ("base", "lora")}
    if phase.kind != "load" or phase.churn_per_s or not any(mix.values()):
        return None
    if mix.get("lora") and not 0 < phase.adapters <= _MAX_ADAPTERS:
        return None
    return replace(phase, mix=mix, warm=False)


def n_adapters_of(phase: Phase) -> int:
    """Return how many adapters a server for this phase loads at start."""
    return phase.adapters if phase.mix.get("lora") else 0
