"""The definition of each operator in PyTorch. Faster versions are tested against it."""
