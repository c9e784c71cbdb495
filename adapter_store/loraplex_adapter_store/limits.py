"""The largest adapter that the store reads."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StoreLimits"]


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Checked before anything is allocated. Sizes in bytes."""

    max_file_bytes: int = 4 << 30
    max_header_bytes: int = 16 << 20
    max_config_bytes: int = 1 << 20
    max_tensors: int = 100_000
    max_rank: int = 512  # per module; shared bases (VeRA, RandLoRA) are not bound by it
    max_experts: int = 64
    max_virtual_tokens: int = 1024
    max_delta_rank: int = 64  # rank a full fine-tune is compressed to
    min_delta_energy: float = 0.95  # kept share of ‖ΔW‖² below which a full fine-tune is refused
    refuse_other_base: bool = False  # refuse when base_model_name_or_path names another model
    host_wait_s: float = 30.0  # how long a load waits for leased plans to leave the host tier
