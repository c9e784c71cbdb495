"""Native CPU kernels and the Python that calls them."""
