"""The operators of a base model's layers, each in the fastest version for its tensors."""
