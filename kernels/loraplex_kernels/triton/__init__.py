"""Triton kernels: the LoRA operator, the layers of a base, sampling. Importing needs no GPU."""
