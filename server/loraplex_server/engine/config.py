"""What the engine is told once, at start."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineConfig"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Resolved by ``loraplex_server.config``; the engine reads no flags and no environment.

    ``auto`` and None mean that the engine picks what fits the device and the model.
    """

    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    dtype: str = "auto"  # "auto", "bfloat16", "float16", "float32"
    max_model_len: int | None = None  # tokens of prompt + output; None = the model's own
    max_batch_size: int = 64  # requests of one step
    max_step_tokens: int | None = None  # prefill chunks included; None = 512, 128 on a CPU
    max_queue: int = 512  # waiting requests before QueueFull
    kv_memory_bytes: int | None = None  # of the paged KV cache
    adapter_memory_bytes: int | None = None  # of the device pool of adapter pages
    max_loras: int = 64  # distinct adapters of one step
    max_lora_rank: int | None = None  # None = any rank that fits the pool
    page_size: int = 16  # tokens of a KV page
    prefix_cache: bool = True
    cuda_graphs: bool = True  # decode steps on a GPU are recorded at start and replayed
    lora_side_stream: bool = False  # on a GPU adapters shrink x beside the base's product
    kernels: str = "native"  # on a CPU; "reference": the PyTorch code that they are held against
    fuse: bool = True  # the layers as one list of kernels, where the architecture is known
    threads: int | None = None  # CPU compute threads; None = torch's default

    def __post_init__(self) -> None:
        """Raises ValueError: a bad value stops the start."""
        for name in ("max_batch_size", "max_queue", "max_loras", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "max_model_len",
            "max_step_tokens",
            "kv_memory_bytes",
            "adapter_memory_bytes",
            "max_lora_rank",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.kernels not in ("native", "reference"):
            raise ValueError(f"kernels is {self.kernels!r}; choose native or reference")
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; choose auto, bfloat16, float16 or float32")
