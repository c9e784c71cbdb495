"""The LoRA operator on a GPU: a shrink launch, then an expand launch."""

from torch import Tensor

from loraplex_kernels.formats.layout import DeviceSegments, LoraSegments, LoraTables

from .expand import lora_expand
from .shrink import lora_shrink


def lora_apply_triton(
    x: Tensor, tables: LoraTables, segments: LoraSegments, *, out: Tensor
) -> None:
    """``lora_apply_reference`` on a GPU: adds every segment's product to ``out`` in place.

    ``segments`` must be ``DeviceSegments``. Nothing waits for the device and the launches depend on
    shapes alone, so a CUDA graph may replay them for other segments. A row's bits depend on that
    row and its adapters only. Raises ValueError before the launch that would misread a tensor.
    """
    if not isinstance(segments, DeviceSegments):
        raise ValueError("the GPU operator needs DeviceSegments; call build_segments on the device")
    lora_expand(lora_shrink(x, tables, segments), x, tables, segments, out=out)
