"""Tensor parallelism: an engine of several processes, each with a part of every layer."""
