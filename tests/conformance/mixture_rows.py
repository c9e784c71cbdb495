"""Weighted sums of adapters, asked for in the request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MixtureRow:
    """PEFT's sum of the same files by the same weights is the oracle."""

    id: str  # docs/families.md names it
    parts: tuple[tuple[str, float], ...]  # (row of a LoRA, weight)
    executor: bool = False
    refused: str | None = None
    wrong: str | None = None


MIXTURE_ROWS: tuple[MixtureRow, ...] = (
    MixtureRow("mixture-two", (("lora-plain", 0.7), ("lora-all-linear", 0.3)), executor=True),
    MixtureRow(
        "mixture-three", (("lora-all-linear", 0.5), ("lora-rslora", 0.6), ("lora-layers", -0.4))
    ),
)
