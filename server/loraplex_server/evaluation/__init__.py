"""Compares the answers of adapters with expected ones, for ``loraplex eval`` and jobs."""
