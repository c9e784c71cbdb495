"""The LoRA operator, the pool of adapter factors, and base products with adapters on top."""
