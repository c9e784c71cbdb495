"""The data that kernels read: layouts of factors, gates, weights and sampling, and memory."""
