"""Limits of the adapters that the store reads."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits of an adapter, which are checked before anything is allocated."""

    max_file_bytes: int = 4 << 30
    max_header_bytes: int = 16 << 20
    max_config_bytes: int = 1 << 20
    max_tensors: int = 50_000
    max_rank: int = 512  # per module; shared bases (VeRA, RandLoRA) are exempt
    max_experts: int = 64
    max_virtual_tokens: int = 1024
    max_delta_rank: int = 64  # the rank to which a full fine-tune is compressed
    min_delta_energy: float = 0.95  # least share of ‖ΔW‖² that a compressed fine-tune keeps
    refuse_other_base: bool = False  # refuse if base_model_name_or_path names another model
    host_wait_s: float = 30.0  # longest wait of a load for leased plans to leave the host tier
