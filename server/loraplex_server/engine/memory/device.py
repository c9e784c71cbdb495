"""The device that the engine computes on, and making it current on a thread."""

import torch


def resolve_device(name: str) -> torch.device:
    """Return the device of ``--device``: auto, cpu, cuda or cuda:N. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is not supported; use cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"--device {name} is not supported; use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise ValueError(f"--device {name} was asked for, but torch sees no CUDA device; use cpu")
    index, n_devices = device.index or 0, torch.cuda.device_count()
    if index >= n_devices:
        raise ValueError(
            f"--device {name} was asked for, but torch sees {n_devices} CUDA device"
            f"{'s' if n_devices > 1 else ''}; use cuda:{n_devices - 1} or a smaller number, and "
            "see CUDA_VISIBLE_DEVICES"
        )
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Makes ``device`` current on this thread, for Triton, graphs and page-locked memory.

    Each thread begins with device 0. torch's own operators follow their tensors.
    """
    if device.type != "cpu":
        torch.cuda.set_device(device)


def release_cached_memory(device: torch.device) -> None:
    """Returns torch's cached memory to the device. Waits for the device."""
    if device.type != "cpu":
        torch.cuda.empty_cache()
