"""Reads scenarios: adapters, server options and phases of load.

Read from TOML; unknown keys and values that make no sense are refused, so that a typing error does
not become a measurement.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .shapes import Shape, parse_shape

FAMILIES = ("base", "lora", "mixlora", "block-lora", "generated", "churned")
_PICKS = ("round-robin", "zipf", "fresh")
_SWEEPS = ("adapters", "skew", "load", "working-set", "")
SCENARIOS = Path(__file__).parent / "scenarios"


class ScenarioError(ValueError):
    """Raised for a bad scenario; the message names file, key and allowed values."""


@dataclass(frozen=True, slots=True)
class AdapterSet:
    """Random adapters to write before the run; ranks go round robin."""

    lora: int = 0
    mixlora: int = 0
    block_lora: int = 0
    ranks: tuple[int, ...] = (8,)

    def names(self) -> dict[str, list[str]]:
        """Return the names that the server will use, by family."""
        return {
            "lora": [f"a{number}" for number in range(self.lora)],
            "mixlora": [f"m{number}" for number in range(self.mixlora)],
            "block-lora": [f"b{number}" for number in range(self.block_lora)],
        }


@dataclass(frozen=True, slots=True)
class RequestSpec:
    prompt_chars: int = 400
    max_tokens: int = 32
    json_schema: Mapping[str, Any] | None = None  # of the answers in structured phases


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency limits. Goodput counts requests whose TTFT and mean gap are within them."""

    ttft_s: float = 1.0
    tpot_s: float = 0.1  # mean time per output token after the first

    def __str__(self) -> str:
        return f"first token within {self.ttft_s:g} s, mean gap within {1000 * self.tpot_s:g} ms"


@dataclass(frozen=True, slots=True)
class Phase:
    label: str
    seconds: float = 15.0  # counted
    warmup_s: float = 3.0  # the same load before, not counted
    kind: str = "load"  # or "tiers": one request at a time, from a known tier
    users: Shape | None = None  # closed loop: as many, each sends when its last answer is there
    rate: Shape | None = None  # open loop: Poisson arrivals per second
    structured: bool = False  # answers follow the request's JSON schema, and end where it does
    warm: bool = False  # place its adapters on the device first, through the admin API
    adapters: int = 0  # distinct LoRA adapters of this phase; 0: all
    pick: str = "round-robin"
    zipf: tuple[float, float] = (0.0, 0.0)  # exponent at the beginning and at the end
    drift: float = 0.0  # how often the popular end wanders through all adapters
    mix: Mapping[str, float] = field(default_factory=lambda: {"lora": 1.0})
    churn_per_s: float = 0.0  # uploads, re-uploads and removals
    sweep: str = ""  # which curve of the report this phase is a point of
    probes: int = 8  # of each tier, for kind "tiers"

    @property
    def x(self) -> float:
        """The phase's x value on its curve."""
        if self.sweep == "skew":
            return self.zipf[0]
        if self.sweep == "load":
            shape = self.rate or self.users
            return shape.level(0.0, self.seconds) if shape else 0.0
        return float(self.adapters)


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    summary: str
    phases: tuple[Phase, ...]
    seed: int = 1
    server: Mapping[str, object] = field(default_factory=dict)  # options of `loraplex serve`
    adapters: AdapterSet = field(default_factory=AdapterSet)
    request: RequestSpec = field(default_factory=RequestSpec)
    slo: Slo = field(default_factory=Slo)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds + phase.warmup_s for phase in self.phases if phase.kind == "load")


def scenario_files() -> dict[str, Path]:
    return {path.stem: path for path in sorted(SCENARIOS.glob("*.toml"))}


def load_scenario(name: str) -> Scenario:
    """Load a scenario by name or by the path of a TOML file. Raises ScenarioError."""
    known = scenario_files()
    path = known.get(name) or Path(name)
    if not path.is_file():
        raise ScenarioError(f"unknown scenario {name!r}; known: {', '.join(known)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{path}: {error}") from error
    return parse_scenario(path.stem, table)


def parse_scenario(name: str, table: Mapping[str, Any]) -> Scenario:
    """Parse a scenario. Raises ScenarioError."""
    try:
        phases = tuple(_phase(item) for item in table.get("phase", ()))
        if not phases:
            raise ValueError("there is no [[phase]]")
        rest = _known("the scenario", Scenario, {k: v for k, v in table.items() if k != "phase"})
        adapters = _known("[adapters]", AdapterSet, rest.pop("adapters", {}))
        if "ranks" in adapters:
            adapters["ranks"] = tuple(adapters["ranks"])
        scenario = Scenario(
            name=name,
            phases=phases,
            adapters=AdapterSet(**adapters),
            request=RequestSpec(**_known("[request]", RequestSpec, rest.pop("request", {}))),
            slo=Slo(**_known("[slo]", Slo, rest.pop("slo", {}))),
            **rest,
        )
        for phase in phases:
            _check(phase, scenario)
    except (ValueError, TypeError) as error:
        raise ScenarioError(f"scenario {name}: {error}") from error
    return scenario


def _phase(table: Mapping[str, Any]) -> Phase:
    values = _known("[[phase]]", Phase, table)
    for key in ("users", "rate"):
        if key in values:
            values[key] = parse_shape(values[key])
    if "zipf" in values:
        given = values["zipf"]
        ends = given if isinstance(given, list) else [given, given]
        values["zipf"] = (float(ends[0]), float(ends[1]))
        values.setdefault("pick", "zipf")
    return Phase(**values)


def _check(phase: Phase, scenario: Scenario) -> None:
    where = f"phase {phase.label!r}"
    if phase.kind not in ("load", "tiers"):
        raise ValueError(f"{where}: unknown kind {phase.kind!r}; known: load, tiers")
    if phase.kind == "load" and (phase.users is None) == (phase.rate is None):
        raise ValueError(f"{where}: give users (closed loop) or rate (open loop), one of them")
    if phase.pick not in _PICKS:
        raise ValueError(f"{where}: unknown pick {phase.pick!r}; known: {', '.join(_PICKS)}")
    if phase.sweep not in _SWEEPS:
        raise ValueError(f"{where}: unknown sweep {phase.sweep!r}; known: {', '.join(_SWEEPS)}")
    for family, share in phase.mix.items():
        if family not in FAMILIES:
            raise ValueError(f"{where}: unknown family {family!r}; known: {', '.join(FAMILIES)}")
        if share < 0:
            raise ValueError(f"{where}: the share of {family} is {share}")
    if not any(phase.mix.values()):
        raise ValueError(f"{where}: nothing in its mix")
    there = {
        "lora": scenario.adapters.lora,
        "mixlora": scenario.adapters.mixlora,
        "block-lora": scenario.adapters.block_lora,
    }
    for family, count in there.items():
        if phase.mix.get(family) and not count:
            raise ValueError(f"{where} asks for {family}, but [adapters] has none")
    if phase.structured and scenario.request.json_schema is None:
        raise ValueError(f"{where} is structured, but [request] has no json_schema")
    if phase.adapters > scenario.adapters.lora:
        raise ValueError(
            f"{where} uses {phase.adapters} adapters, [adapters] has {scenario.adapters.lora}"
        )
    if phase.mix.get("churned") and not phase.churn_per_s:
        raise ValueError(f"{where}: churned adapters need churn_per_s")


def _known(where: str, owner: type, table: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(owner)}
    values = {key.replace("-", "_"): value for key, value in table.items()}
    for key in values:
        if key not in names or (owner is Scenario and key in ("name", "phases")):
            raise ValueError(f"{where} has no {key!r}; known: {', '.join(sorted(names))}")
    return values
