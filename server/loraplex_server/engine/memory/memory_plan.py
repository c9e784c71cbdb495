"""Divides the memory of a GPU: weights and a step first, then adapters and the KV cache.

usable  = total · utilization − taken − step
adapters = 20 % of usable, the KV cache the rest
"""

from dataclasses import dataclass

from loraplex_kernels.formats.layout import MAX_RANK

ADAPTER_SHARE = 0.2
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """Bytes measured on the device once the base is loaded."""

    total: int
    taken: int  # by weights, the CUDA context and other processes
    step: int  # peak of the tensors of the largest step


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    kv_bytes: int
    adapter_bytes: int


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """The size of the adapter pool."""

    n_bytes: int
    n_slots: int
    max_rank: int = MAX_RANK  # of an adapter, and so of the pool's tables


def plan_memory(
    profile: MemoryProfile,
    *,
    utilization: float,
    kv_bytes: int | None = None,
    adapter_bytes: int | None = None,
    min_kv_bytes: int = 0,
) -> MemoryPlan:
    """Return the bytes of the KV cache and the adapter pool.

    ``kv_bytes`` and ``adapter_bytes`` are the user's; if one is missing it gets the rest.
    ``min_kv_bytes`` is the KV of one request of full length. Raises ValueError with the numbers and
    a remedy if the memory is too small.
    """
    usable = int(profile.total * utilization) - profile.taken - profile.step
    adapters = adapter_bytes
    if adapters is None:
        free = usable - (kv_bytes or 0)
        adapters = max(0, free if kv_bytes is not None else int(free * ADAPTER_SHARE))
    kv = usable - adapters if kv_bytes is None else kv_bytes
    if kv < min_kv_bytes:
        raise ValueError(
            f"the KV cache would get {_mib(max(0, kv))}, and one request of full length takes "
            f"{_mib(min_kv_bytes)}; lower --max-model-len or --max-step-tokens, or raise "
            f"--gpu-memory-utilization ({_account(profile, utilization)})"
        )
    if kv + adapters > usable:
        raise ValueError(
            f"--kv-memory and --adapter-memory take {_mib(kv + adapters)} together, and "
            f"{_mib(max(0, usable))} are left; lower them, or raise --gpu-memory-utilization "
            f"({_account(profile, utilization)})"
        )
    return MemoryPlan(kv, adapters)


def _account(profile: MemoryProfile, utilization: float) -> str:
    return (
        f"{utilization:.0%} of {_mib(profile.total)}, less {_mib(profile.taken)} for weights and "
        f"other processes, less {_mib(profile.step)} for a step"
    )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / _MIB:,.0f} MiB"
