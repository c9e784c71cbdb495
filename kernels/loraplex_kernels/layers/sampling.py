"""Sampling on any device. ``formats.sampling_batch`` says what a row's token depends on."""

from torch import Tensor

from loraplex_kernels.cpu.sampling import sample_tokens_cpu
from loraplex_kernels.formats.sampling_batch import SamplingBatch
from loraplex_kernels.reference.sampling import sample_tokens_reference


def sample_tokens(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Return the token of each row, int32 [n]; -1 where no token has a probability.

    ``logits`` float32 [n, vocab_size] is contiguous. Edits and masks may change it in place. On
    a GPU nothing waits for the device.
    """
    if logits.is_cuda:
        from loraplex_kernels.triton.sampling import sample_tokens_triton

        return sample_tokens_triton(logits, batch)
    if logits.is_cpu:
        return sample_tokens_cpu(logits, batch)
    return sample_tokens_reference(logits, batch)
