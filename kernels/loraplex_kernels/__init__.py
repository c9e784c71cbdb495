"""Mixed-adapter LoRA kernels: the operator, its reference, and its Triton and CPU versions."""
