"""The training methods of adapters: each file has a formula, a file format and a fold."""
